"""Sampling: distributions by hand and by counting, seeds, batches, and the two ends that equal greedy search."""

import math
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from florence2 import Florence2, Generation, GenerationOptions
from florence2.errors import OptionError
from florence2.generation.budget import generation_bytes
from florence2.generation.sampling import drawable
from florence2.generation.search import search
from florence2.generation.state import SpecialIds
from florence2.tracing.budget import AnswerSizes, answer_bytes
from florence2.tracing.names import names_of
from parity.recipe import make_picture
from tests.release import keep

P = [0.1, 0.4, 0.05, 0.25, 0.2]
"""Probabilities of five ids; 2 is the end."""


def draw(count: int, inputs: int = 1, **changes: Any) -> Generation:
    """Draw `count` samples of one id each for every input."""
    plain = GenerationOptions.from_settings({"max_new_tokens": 1})
    options = plain.changed(sample=True, num_return_sequences=count, **changes)
    logits = torch.tensor(P).log()
    return search(lambda newest: logits.expand(len(newest), -1) + 3.0, lambda _: None, inputs, options, SpecialIds())


def frequencies(**changes: Any) -> list[float]:
    counts = draw(2000, **changes).sequences[:, 1].bincount(minlength=5)
    return [float(count) / 2000 for count in counts]


def within_bounds(observed: list[float], expected: list[float]) -> bool:
    """Within 4 standard errors of 2,000 draws; ids of probability 0 never."""
    return all(abs(o - e) <= 4 * math.sqrt(e * (1 - e) / 2000) for o, e in zip(observed, expected, strict=True))


def normalised(*weights: float) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, normalised(*(p**2 for p in P))),
        ({"temperature": 2.0}, normalised(*(p**0.5 for p in P))),
        ({"top_k": 2}, normalised(0, 0.4, 0, 0.25, 0)),
        ({"top_p": 0.6}, normalised(0, 0.4, 0, 0.25, 0)),
        ({"top_p": 0.7}, normalised(0, 0.4, 0, 0.25, 0.2)),
        ({"top_k": 3, "top_p": 0.5}, normalised(0, 0.4, 0, 0.25, 0)),
        ({"temperature": 0.5, "top_p": 0.6}, normalised(0, 0.4**2, 0, 0.25**2, 0)),
    ],
    ids=str,
)
def test_frequencies(changes: dict[str, Any], expected: list[float]) -> None:
    observed = frequencies(seed=0, **changes)
    assert within_bounds(observed, expected)
    assert not within_bounds(observed, [0.2] * 5)


def test_top_p_keeps_the_smallest_set() -> None:
    """Sorted 0.4, 0.25, 0.2, 0.1, 0.05, with sums 0.4, 0.65, 0.85, 0.95, 1: the id that reaches the sum is kept."""
    scores = torch.tensor([P]).log()
    for top_p, kept in ((0.01, [1]), (0.39, [1]), (0.5, [1, 3]), (0.7, [1, 3, 4]), (0.9, [1, 3, 4, 0])):
        ids, probabilities = drawable(scores, 1.0, 0, top_p)
        assert ids[0, (probabilities > 0)[0]].tolist() == kept
    ids, probabilities = drawable(scores, 1.0, 0, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] and torch.allclose(probabilities, torch.tensor([P]))


def test_top_k_of_a_large_vocabulary() -> None:
    scores = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0))
    ids, _ = drawable(scores, 1.0, 4, 1.0)
    assert ids.tolist() == scores.topk(4).indices.tolist()


def test_impossible_ids_are_never_drawn() -> None:
    scores = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for top_k, top_p in ((0, 1.0), (4, 1.0), (0, 0.99)):
        ids, probabilities = drawable(scores, 0.01, top_k, top_p)
        assert sorted(ids[0, (probabilities > 0)[0]].tolist()) == [1, 3]


def test_a_draw_that_rounding_moved_to_an_impossible_id_takes_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator may add in another order for each sum."""
    monkeypatch.setattr(torch, "searchsorted", lambda sums, draws, right: torch.full_like(draws, 2, dtype=torch.int64))
    assert draw(3, seed=0, temperature=0.01).sequences[:, 1].tolist() == [1, 1, 1]


def test_log_probabilities_are_those_before_temperature_and_cuts() -> None:
    found = draw(50, seed=1, temperature=0.3, top_k=3)
    expected = torch.tensor(P).log()[found.sequences[:, 1]]
    assert torch.allclose(found.token_logprobs[:, 0], expected, atol=1e-6)
    assert torch.allclose(found.sequence_scores, expected, atol=1e-6)


def test_a_seed_gives_the_same_draws_whatever_else_is_drawn() -> None:
    first = draw(5, seed=7).sequences[:, 1].tolist()
    assert draw(5, seed=7).sequences[:, 1].tolist() == first != draw(5, seed=8).sequences[:, 1].tolist()
    assert draw(3, seed=7).sequences[:, 1].tolist() == first[:3]
    assert draw(5, inputs=3, seed=7).sequences[:, 1].tolist() == first * 3


def test_without_a_seed_torchs_own_generator_draws() -> None:
    torch.manual_seed(3)
    first = draw(20, inputs=2).sequences[:, 1].tolist()
    assert first[:20] != first[20:]
    assert draw(20, inputs=2).sequences[:, 1].tolist() != first
    torch.manual_seed(3)
    assert draw(20, inputs=2).sequences[:, 1].tolist() == first
    state = torch.get_rng_state()
    draw(20, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


REQUESTS = [("<OD>", make_picture(seed, 60, 40)) for seed in range(4)] + [("<CAPTION>", make_picture(9, 60, 40))]


def sampled(small: Florence2, **changes: Any) -> GenerationOptions:
    return small.options(sample=True, seed=0, max_new_tokens=12, **changes)


@pytest.mark.parametrize("changes", keep([1], [{}, {"num_return_sequences": 3, "temperature": 1.3}]), ids=str)
def test_a_batch_gives_what_each_request_gives_alone(small: Florence2, changes: dict[str, Any]) -> None:
    options = sampled(small, **changes)
    singles = [small.run(*request, options=options) for request in REQUESTS]
    for together in (small.run_batch(REQUESTS, options=options), small.run_batch(REQUESTS, options=options)):
        for alone, answer in zip(singles, together, strict=True):
            assert answer.token_ids == alone.token_ids
            assert [a.token_ids for a in answer.alternatives] == [a.token_ids for a in alone.alternatives]
            assert len(answer.alternatives) == options.num_return_sequences - 1
    others = small.run_batch(REQUESTS, options=options.changed(seed=1))
    assert [a.token_ids for a in together] != [a.token_ids for a in others]


def test_samples_that_end_early_leave_the_rest_alone() -> None:
    """Inputs whose samples end at different steps, with and without being left out."""
    rows: list[int] = []

    def step(newest: Tensor) -> Tensor:
        rows.append(len(newest))
        return torch.tensor(P).log().roll(0).expand(len(newest), -1) + 0.1 * newest[:, None]

    options = GenerationOptions.from_settings({"max_new_tokens": 60}).changed(sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    kept = search(step, lambda _: None, 6, options, SpecialIds())
    torch.manual_seed(0)
    left_out = search(step, lambda _: None, 6, options, SpecialIds(), keep=lambda _: None)
    assert kept.sequences.tolist() == left_out.sequences.tolist()
    assert kept.lengths.tolist() == left_out.lengths.tolist() and len({*kept.lengths.tolist()}) > 3
    assert torch.equal(kept.token_logprobs, left_out.token_logprobs) and min(rows) < 12
    for row, length in enumerate(kept.lengths.tolist()):
        ids = kept.sequences[row].tolist()
        assert (ids[length] == 2) == (kept.finish_reasons[row] == "stop") and 2 not in ids[1:length]
        assert {*ids[1 + length :]} <= {1} and not kept.token_logprobs[row, length:].any()


@pytest.mark.parametrize("changes", keep([1], [{"temperature": 0.01}, {"top_k": 1}, {"top_p": 1e-6}]), ids=str)
def test_what_leaves_no_choice_is_greedy(small: Florence2, changes: dict[str, Any]) -> None:
    greedy = small.run_batch(REQUESTS, num_beams=1, max_new_tokens=12)
    sure = small.run_batch(REQUESTS, options=sampled(small, **changes))
    assert [a.token_ids for a in sure] == [a.token_ids for a in greedy]
    assert [a.token_logprobs for a in sure] == [pytest.approx(a.token_logprobs, abs=1e-4) for a in greedy]
    assert [a.token_ids for a in small.run_batch(REQUESTS, options=sampled(small))] != [a.token_ids for a in greedy]


def test_the_rules_hold(small: Florence2, images: list[Image.Image]) -> None:
    options = sampled(small, min_new_tokens=9, num_return_sequences=5, temperature=2.0)
    answer = small.run("<OD>", images[0], options=options)
    for each in (answer, *answer.alternatives):
        assert each.token_ids[:2] == (2, 0) and len(each.token_ids) > 9


def test_a_traced_run_is_the_same(small: Florence2, images: list[Image.Image]) -> None:
    options = sampled(small, num_return_sequences=3)
    answer = small.run("<OD>", images[0], options=options)
    with small.trace("scores", "decoder.layers.0") as t:
        traced = small.run("<OD>", images[0], options=options)
    answers = (traced, *traced.alternatives)
    assert [a.token_ids for a in answers] == [a.token_ids for a in (answer, *answer.alternatives)]
    for k, each in enumerate(answers):
        ids = torch.tensor(each.token_ids[1:])
        assert t.run.rows(k) == (k,) * len(ids)
        logprobs = t.along_answer("scores", k).gather(1, ids[:, None])[:, 0]
        assert logprobs.tolist() == pytest.approx(list(each.token_logprobs), abs=1e-5)


def test_samples_take_the_memory_of_as_many_beams(small: Florence2) -> None:
    config, length = small.model.config, 100
    beams = small.options(num_beams=4, confidence=False)  # which is of every sequence that is returned
    samples = small.options(sample=True, num_return_sequences=4, confidence=False)
    sizes = [generation_bytes(config, options, length, torch.float32) for options in (beams, samples)]
    assert sizes[0] == sizes[1]
    scores = [name for name in names_of(config) if name.name == "scores"]
    traced = [answer_bytes(scores, config, AnswerSizes(1, 9, 3, options)) for options in (beams, samples)]
    assert traced[0] == traced[1] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample": 1}, "sample is 1; it must be True or False"),
        ({"temperature": 0}, "temperature is 0; it must be 0.01 to 100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number of at least 0"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0"),
        ({"seed": 1 << 63}, "seed is"),
        ({"seed": True}, "seed is True"),
        ({"num_beams": 3}, "sample is True and num_beams 3; sampling uses no beams, so set num_beams=1"),
        ({"sample": False, "temperature": 0.7}, "temperature 0.7 has no effect without sampling; set sample=True"),
        ({"sample": False, "seed": 0}, "seed 0 has no effect"),
    ],
)
def test_wrong_values(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        GenerationOptions().changed(**{"sample": True, **changes})


def test_sampling_replaces_the_beams_of_a_checkpoint() -> None:
    options = GenerationOptions(num_beams=3).changed(sample=True, num_return_sequences=4)
    assert (options.num_beams, options.width) == (1, 4)
    with pytest.raises(OptionError, match="set num_beams=1"):
        GenerationOptions(sample=True)
