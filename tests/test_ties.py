"""Answers that part where two scores are equal up to rounding are ties; others are differences."""

import math

import pytest
import torch
from torch import Tensor

from florence2.model.florence2 import Florence2Model
from parity.cases import shapes
from parity.recipe import make_model
from parity.report import Comparison
from parity.ties import TokenCount, is_tie, strip

A, B, END = 700, 800, 2


@pytest.fixture
def model() -> Florence2Model:
    """A model that gives the tokens A and B the same logits everywhere."""
    shape = shapes()[1]
    model = make_model(shape.config, shape.seed, shape.end_bonus)
    with torch.no_grad():
        model.language_model.shared.weight[B] = model.language_model.shared.weight[A]
        model.final_logits_bias[0, B] = model.final_logits_bias[0, A]
    return model


@pytest.fixture
def memory(model: Florence2Model) -> Tensor:
    return torch.randn(1, 20, model.config.text.d_model, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tail", [[], [A, END], [5, 6, 7]])
def test_equal_logits_are_a_tie(model: Florence2Model, memory: Tensor, tail: list[int]) -> None:
    assert is_tie(model, lambda: memory, [2, 0, A, *tail], [2, 0, B, 9, *tail])


@pytest.mark.parametrize("change", [1e-3, -1e-3])
def test_close_logits_are_a_difference(model: Florence2Model, memory: Tensor, change: float) -> None:
    model.final_logits_bias[0, B] += change
    assert not is_tie(model, lambda: memory, [2, 0, A, END], [2, 0, B, END])


def test_hypotheses_with_equal_sums_are_a_tie(model: Florence2Model, memory: Tensor) -> None:
    """Two beams part early and are level again later, where the search keeps one of them."""
    one, other = [2, 0, 5, A], [2, 0, 6, B]
    assert not is_tie(model, lambda: memory, one, other)
    with torch.no_grad():
        logprobs = [model.decode(torch.tensor([ids[:-1]]), memory).log_softmax(-1)[0] for ids in (one, other)]
    sums = [float(sum(row[i, ids[i + 1]] for i in range(3))) for row, ids in zip(logprobs, (one, other), strict=True)]
    # move the last token of the second by the missing part, alone in its softmax: p' = p e^d
    missing, last = sums[0] - sums[1], float(logprobs[1][2, B].exp())
    wanted = last * math.exp(missing)
    if wanted >= 1:
        pytest.fail("choose other tokens: the sums cannot be made equal")
    shift = math.log(wanted * (1 - last) / (last * (1 - wanted)))

    def decode(ids: Tensor, memory: Tensor) -> Tensor:
        logits = Florence2Model.decode(model, ids, memory).double()
        if ids[0].tolist() == other[:-1]:
            logits[0, -1, B] += shift
        return logits

    model.decode = decode  # type: ignore[method-assign, assignment]
    assert is_tie(model, lambda: memory, one, other)


def test_an_answer_that_stops_sooner_is_a_difference(model: Florence2Model, memory: Tensor) -> None:
    assert not is_tie(model, lambda: memory, [2, 0, A], [2, 0, A, END])


def test_ties_are_counted_apart(model: Florence2Model, memory: Tensor) -> None:
    count, calls = TokenCount(), []

    def encode() -> Tensor:
        calls.append(1)
        return memory

    assert count.add(model, encode, [[2, 0, A, END, 1, 1]], [[2, 0, A, END]]) and not calls
    assert not count.add(model, encode, [[2, 0, A, END]], [[2, 0, B, END]])
    assert not count.add(model, encode, [[2, 0, A, END], [2, 0, 5, END]], [[2, 0, B, END], [2, 0, 6, END]])
    assert count == TokenCount(equal=1, ties=1, total=3)


def test_a_tie_passes_and_a_difference_does_not() -> None:
    assert Comparison("native", "x", "tokens", 9, 10, ties=1).passes({})
    assert not Comparison("native", "x", "tokens", 8, 10, ties=1).passes({})
    assert not Comparison("native", "x", "tokens", 0, 0).passes({})


def test_padding_does_not_count() -> None:
    assert strip([2, 0, 1, 5, 1, 1], 1) == [2, 0, 1, 5] and strip([1, 1], 1) == []
