"""The search on arrays against the one on tensors where the tables of `tests/generation` are too small to show it."""

from typing import Any

import numpy as np
import pytest
import torch

from florence2.generation.options import GenerationOptions
from florence2.generation.sampling import drawable as drawable_tensors
from florence2.generation.search import search as search_tensors
from florence2.generation.state import SpecialIds
from florence2.lite.search.arrays import NEVER, largest, log_softmax
from florence2.lite.search.search import draw, drawable, search
from tests.generation.tables import as_generation
from tests.release import keep

V = 3000
IDS = SpecialIds(start=0, end=1, pad=2)
PLAIN = GenerationOptions.from_settings({"max_new_tokens": 70})


@pytest.mark.parametrize(
    "changes",
    keep(
        [2, 4],
        [
            {},
            {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 3},
            {"num_beams": 5, "num_return_sequences": 5, "repetition_penalty": 1.2, "forced_eos_token_id": 1},
            {"sample": True, "seed": 5, "num_return_sequences": 3},
            {"sample": True, "seed": 6, "top_k": 40, "top_p": 0.8, "temperature": 1.5},
            {"sample": True, "seed": 7, "top_p": 0.95},
        ],
    ),
    ids=str,
)
def test_a_large_vocabulary_and_long_answers(changes: dict[str, Any]) -> None:
    options = PLAIN.changed(**changes)
    table = np.random.default_rng(1).normal(0, 2, (V, V)).astype(np.float32)
    table[:, 1] += 3.0  # some end before the limit
    found = as_generation(search(lambda newest: table[newest], lambda *_: None, 1, options, IDS)[0], IDS)
    expected = search_tensors(lambda newest: torch.from_numpy(table)[newest], lambda _: None, 1, options, IDS)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.finish_reasons == expected.finish_reasons
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert torch.allclose(found.token_logprobs, expected.token_logprobs, atol=1e-5)
    assert torch.allclose(found.sequence_scores, expected.sequence_scores, atol=1e-5)


def test_equal_scores_by_the_lower_index() -> None:
    even = np.zeros((3, 1000), np.float32)
    assert largest(even.ravel(), 4).tolist() == [0, 1, 2, 3]
    [found] = search(lambda newest: even[: len(newest)], lambda *_: None, 1, PLAIN.changed(max_new_tokens=1), IDS)
    assert found[0].ids.tolist() == [0, 0]
    options = PLAIN.changed(num_beams=3, num_return_sequences=3, max_new_tokens=1)
    [found] = search(lambda _: even, lambda *_: None, 1, options, IDS)
    assert [each.ids.tolist() for each in found] == [[0, 1], [0, 0], [0, 2]]  # ended ones come first


@pytest.mark.parametrize("count", [1, 6, 300])
def test_the_largest_values(count: int) -> None:
    rng = np.random.default_rng(count)
    for values in (
        rng.normal(size=5000),
        rng.integers(0, 5, 5000).astype(float),
        np.where(rng.random(5000) < 0.001, 1.0, NEVER),
        rng.normal(size=400),
    ):
        expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
        assert largest(values, count).tolist() == expected


def test_log_probabilities_of_large_and_impossible_logits() -> None:
    logits = np.array([[1e4, 0.0, NEVER], [-5.0, -5.0, -5.0]], np.float32)
    assert np.exp(log_softmax(logits)).tolist() == [[1, 0, 0], pytest.approx([1 / 3] * 3)]


@pytest.mark.parametrize("seed", [0, 1, (1 << 31) + 5, (1 << 40) + 3, (1 << 63) - 1])
def test_a_seed_draws_the_numbers_of_torch(seed: int) -> None:
    expected = torch.rand(3, 700, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
    assert draw(3, 700, seed).tolist() == expected.clamp_(max=1 - 1e-6).tolist()


def test_without_a_seed_numpys_own_generator_draws() -> None:
    np.random.seed(3)
    first = draw(2, 50, None)
    assert not np.array_equal(first, draw(2, 50, None)) and first.min() >= 0 and first.max() < 1
    np.random.seed(3)
    assert np.array_equal(first, draw(2, 50, None))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.6), (9, 0.5)])
def test_what_may_be_drawn(top_k: int, top_p: float) -> None:
    scores = np.random.default_rng(0).normal(0, 2, (4, 800)).astype(np.float32)
    ids, probabilities = drawable(scores, 0.7, top_k, top_p)
    expected_ids, expected = drawable_tensors(torch.from_numpy(scores), 0.7, top_k, top_p)
    assert ids.tolist() == expected_ids.tolist()
    assert np.allclose(probabilities, expected.numpy(), atol=1e-6)


def test_never_looks_at_the_present_length_where_short_answers_score_best() -> None:
    """As in `tests/generation/test_search.py`: at the limit of 40 ids the best sum would count 13 times."""
    likely = {0: {3: 0.8, 1: 0.1, 4: 0.1}, 3: {4: 0.8, 1: 0.1, 5: 0.1}, 4: {1: 1.0}}
    table = np.log([[likely.get(row, {1: 1.0}).get(id, 1e-9) for id in range(6)] for row in range(6)])
    options = PLAIN.changed(num_beams=2, num_return_sequences=2, max_new_tokens=40, length_penalty=-0.7)
    [found] = search(lambda newest: table[newest], lambda *_: None, 1, options.changed(early_stopping="never"), IDS)
    assert [each.ids.tolist() for each in found] == [[0, 3, 4, 1], [0, 1]]
    assert [each.score for each in found] == pytest.approx([-0.9629, -2.3026], abs=1e-4)
