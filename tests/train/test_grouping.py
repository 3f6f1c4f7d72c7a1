"""Rows of a micro-batch are grouped by length: little padding, every row once, the same order of the data."""

import random
from dataclasses import replace

import pytest

from florence2.processor import Processor
from florence2.train.data import StepData
from florence2.train.grouping import PADDING, count_positions, group_rows, split_rows
from florence2.train.settings import TrainSettings
from recipes.nano.train import RETELLING_WEIGHTS, WEIGHTS, SceneSamples
from tests.release import keep


def random_lengths(seed: int) -> tuple[list[int], list[int]]:
    """Prompts and answers of up to 70 rows, most of them short."""
    rng = random.Random(seed)
    count = rng.randint(1, 70)
    return tuple([1 + int(rng.expovariate(1 / mean)) for _ in range(count)] for mean in (20, 60))  # type: ignore[return-value]


def padded(prompts: list[int], answers: list[int], image_tokens: int) -> tuple[int, int]:
    """Positions computed and padding among them, counted row by row from the groups."""
    computed = 0
    for group in group_rows(prompts, answers, image_tokens):
        widest = max(prompts[row] for row in group.rows)
        for rows in group.answers:
            computed += sum(image_tokens + widest + max(answers[row] for row in rows) for _ in rows)
    return computed, computed - sum(prompts) - sum(answers) - image_tokens * len(prompts)


@pytest.mark.parametrize("image_tokens", [1, 145, 577])
def test_padding_stays_under_its_share(image_tokens: int) -> None:
    for seed in range(100):
        prompts, answers = random_lengths(seed)
        computed, padding = padded(prompts, answers, image_tokens)
        assert padding <= PADDING * computed
        assert count_positions(prompts, answers, image_tokens) == (computed, padding)
        groups = group_rows(prompts, answers, image_tokens)
        assert sum(len(group.answers) for group in groups) < (45 if image_tokens == 1 else 20)


def test_every_row_is_computed_once() -> None:
    for seed in range(100):
        prompts, answers = random_lengths(seed)
        groups = group_rows(prompts, answers, 10)
        assert sorted(row for group in groups for row in group.rows) == list(range(len(prompts)))
        for group in groups:
            assert sorted(row for rows in group.answers for row in rows) == group.rows


def test_rows_that_need_no_padding_stay_together() -> None:
    assert [group.rows for group in group_rows([5, 5, 5], [7, 7, 7], 10)] == [[0, 1, 2]]
    assert [len(group.answers) for group in group_rows([5, 5, 5], [70, 7, 7], 10)] == [2]
    assert [group.rows for group in group_rows([5, 50, 5], [7, 7, 7], 10)] == [[1], [0, 2]]
    assert [group.rows for group in group_rows([5, 50, 5], [7, 7, 7], 577)] == [[0, 1, 2]]
    # more than half of what is allowed, but answers need none of it
    assert [group.rows for group in group_rows([5, 50, 5], [7, 7, 7], 330)] == [[0, 1, 2]]
    assert [group.rows for group in group_rows([5, 50, 5], [7, 90, 7], 330)] == [[1], [0, 2]]


def test_rows_are_split_by_length() -> None:
    assert split_rows([5, 5, 5]) == [[0, 1, 2]]
    assert split_rows([3, 3, 2]) == [[0, 1], [2]]  # a ninth is padding
    assert split_rows([50, 1000, 50, 52]) == [[1], [3, 0, 2]]
    assert split_rows([50, 100, 60, 90], others=4000) == [[1, 3, 2, 0]]
    assert split_rows([50, 100, 60, 90], others=4000, padding=400) == [[1, 3], [2, 0]]
    assert split_rows([50, 100, 60, 90], others=4000, share=0.0) == [[1], [3], [2], [0]]
    assert split_rows([7, 1, 7, 1], groups=[[1, 0], [3, 2]]) == [[0], [1], [2], [3]]
    assert split_rows([7]) == [[0]]


def test_positions_are_counted_as_they_are_computed() -> None:
    """Two prompts of 3 and 5 ids with 10 image tokens; answers of 4 and 2 together, of 400 and 2 apart."""
    assert count_positions([3, 5], [4, 4], 100) == (218, 2)
    assert count_positions([3, 5], [400, 2], 100) == (612, 2)
    assert count_positions([3, 50], [4, 4], 10) == (81, 0)


@pytest.mark.parametrize("batch", keep([0], [8, 32]))
@pytest.mark.parametrize("weights", [WEIGHTS, RETELLING_WEIGHTS], ids=["first", "last"])
def test_the_recipe_of_nano_has_little_padding(processor: Processor, batch: int, weights: dict[str, float]) -> None:
    """Its four questions on each image are of every task, and padded together two thirds of their ids were padding."""
    samples, settings = SceneSamples(1, 64, weights=weights), TrainSettings(steps=2, batch=batch)
    for step in range(2):
        chosen = [samples[index] for index in StepData(samples, processor, settings, 1024).indices(step)]
        pairs = [pair for sample in chosen for pair in sample.pairs]
        prompts = [len(processor.prompt(prefix)) for prefix, _ in pairs]
        answers = [len(processor.encode(suffix)) for _, suffix in pairs]
        together = len(pairs) * (max(prompts) + max(answers))
        assert together - sum(prompts + answers) > 0.5 * together
        computed, padding = padded(prompts, answers, 145)
        assert padding <= PADDING * computed


def test_the_groups_do_not_depend_on_who_makes_the_batch(processor: Processor) -> None:
    """A micro-batch depends on seed and step alone: read again, after a resume, or with other workers."""
    samples = SceneSamples(1, 24)
    settings = TrainSettings(steps=9, batch=8, seed=3)

    def groups(data: StepData, step: int) -> object:
        batch = data[step][0]
        prompts, answers = batch.attention_mask.sum(1).tolist(), (batch.labels != -100).sum(1).tolist()
        return group_rows(prompts, answers, 1), batch.input_ids.tolist()

    whole = StepData(samples, processor, settings, 1024)
    expected = [groups(whole, step) for step in range(9)]
    resumed = StepData(samples, processor, replace(settings, workers=2), 1024)
    assert [groups(resumed, step) for step in (8, 4)] == [expected[8], expected[4]]
    assert len({str(each) for each in expected}) == 9
