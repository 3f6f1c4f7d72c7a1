"""Answers of a real model, held against its own answers and against others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from florence2.errors import ImageError, OptionError, PromptError
from florence2.generation.options import GenerationOptions
from florence2.inputs.coordinates import NUM_BINS
from florence2.inputs.tasks import TASKS
from florence2.loading import load
from florence2.model.florence2 import Florence2Model
from florence2.pipeline import Florence2
from florence2.processor import Processor
from florence2.train.evaluate import answer_samples, evaluate
from florence2.train.samples import Sample
from parity.recipe import make_picture
from tests.conftest import count_encodings

INPUTS = {"nothing": "", "text": "a green car", "region": "<loc_100><loc_100><loc_700><loc_600>"}
TOKENS = {task.answer: token for token, task in TASKS.items()}.values()  # one of each kind of answer
PROMPTS = [token + INPUTS[TASKS[token].takes] for token in TOKENS]


@pytest.fixture(scope="module")
def small(small_folder: Path) -> Florence2:
    """The small checkpoint, made to write more location tokens, so that every kind of region occurs."""
    f = load(small_folder, device="cpu")
    first = f.processor.tokenizer.token_id("<loc_0>")
    f.model.final_logits_bias[:, first : first + NUM_BINS] += 3.0
    return f


@pytest.fixture(scope="module")
def options(small: Florence2) -> GenerationOptions:
    return small.options(max_new_tokens=20, num_beams=1)


@pytest.fixture(scope="module")
def own_samples(small: Florence2, options: GenerationOptions) -> list[Sample]:
    """Two images with every kind of task; the answers wanted are those that the model gives."""
    samples = []
    for i in range(2):
        image = make_picture(i, 120 + 20 * i, 90)
        answers = small.run_batch([(prompt, image) for prompt in PROMPTS], options=options)
        pairs = tuple((prompt, answer.text) for prompt, answer in zip(PROMPTS, answers, strict=True))
        samples.append(Sample(image, pairs, f"image {i}"))
    return samples


def test_a_model_agrees_with_itself(
    small: Florence2, options: GenerationOptions, own_samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each image is encoded once."""
    seen: list[tuple[int, int]] = []
    encoded = count_encodings(small, monkeypatch)
    metrics = evaluate(small, own_samples, 4, options, progress=lambda *done: seen.append(done))
    assert sorted(metrics) == sorted(TOKENS) and seen == [(1, 2), (2, 2)] and sum(encoded) == 2
    for task, values in metrics.items():
        assert values.pop("count") == 2 >= values.pop("cut_off")
        assert values == pytest.approx(dict.fromkeys(values, 1.0)), task
    assert {"map_50", "map_50_95", "f1"} <= metrics["<DENSE_REGION_CAPTION>"].keys()


def test_another_image_is_answered_worse(
    small: Florence2, options: GenerationOptions, own_samples: list[Sample]
) -> None:
    mixed = [replace(sample, image=make_picture(90 + i, 150, 80)) for i, sample in enumerate(own_samples)]
    metrics = evaluate(small, mixed, 8, options)
    last = {task: list(values)[-1] for task, values in metrics.items()}
    assert set(last.values()) == {"word_accuracy", "f1", "miou"}
    for task, name in last.items():
        assert metrics[task][name] < 0.9, task


def test_the_size_of_batches_changes_nothing(
    small: Florence2, options: GenerationOptions, own_samples: list[Sample]
) -> None:
    def given(batch_size: int) -> list[Any]:
        rows = answer_samples(small, own_samples[:1], batch_size, options)
        return [outcome.pair[1].token_ids for outcomes in rows for outcome in outcomes]

    assert given(1) == given(7)


def test_the_model_answers_without_dropout_and_keeps_its_mode(mini: Florence2Model, processor: Processor) -> None:
    """Its first part is frozen, and so in evaluation mode before and after."""
    f = Florence2(mini.eval(), processor)
    samples = [Sample(make_picture(1, 60, 60), (("<CAPTION>", "a red circle"), ("<OCR>", "STOP")))]
    options = f.options(max_new_tokens=8)
    expected = [outcome.pair for row in answer_samples(f, samples, options=options) for outcome in row]
    mini.train()
    mini.vision_tower.eval()
    before = [module.training for module in mini.modules()]
    found = [outcome.pair for row in answer_samples(f, samples, options=options) for outcome in row]
    assert [answer.token_logprobs for _, answer in found] == [answer.token_logprobs for _, answer in expected]
    assert [module.training for module in mini.modules()] == before and len(set(before)) == 2


def test_what_is_wrong_costs_its_own_questions_only(
    small: Florence2, options: GenerationOptions, own_samples: list[Sample], tmp_path: Path
) -> None:
    missing = Sample(tmp_path / "missing.png", (("<OD>", "cat"), ("<OCR>", "a")), "row 7")
    unknown = replace(own_samples[1], pairs=(("<COUNT>", "3"), own_samples[1].pairs[0]))
    rows = list(answer_samples(small, [own_samples[0], missing, unknown], 8, options))
    errors = [[type(outcome.error) for outcome in outcomes if outcome.error] for outcomes in rows]
    assert errors == [[], [ImageError] * 2, [PromptError]]
    assert rows[1][0].name == "row 7" and rows[2][0].prompt == "<COUNT>"
    truth, answer = rows[2][1].pair
    assert answer.text == truth.text  # the question next to the bad one has its answer
    with pytest.raises(ImageError, match=r"row 7: .*missing\.png does not exist"):
        evaluate(small, [missing], 8, options)


def test_a_batch_of_nothing_is_refused(small: Florence2, own_samples: list[Sample]) -> None:
    with pytest.raises(OptionError, match="batch_size is 0"):
        evaluate(small, own_samples, 0)
