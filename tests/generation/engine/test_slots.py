"""Answers that join and leave read what they would read alone."""

import random

import pytest
import torch
from torch import Tensor

from florence2.generation.engine.lane import fill_holes
from florence2.generation.engine.slots import SlotCache
from florence2.model.cache import DecoderCache
from florence2.model.florence2 import Florence2Model
from parity.cases import shapes
from parity.recipe import make_model
from tests.conftest import few_words

SHAPE = few_words(shapes()[1])


@pytest.fixture
def model() -> Florence2Model:
    return make_model(SHAPE.config, SHAPE.seed, SHAPE.end_bonus).double()


class Alone:
    """An answer in a cache of its own."""

    def __init__(self, model: Florence2Model, memory: Tensor, beams: int):
        self.cache = DecoderCache(model.language_model.decoder, memory, beams, 200)
        self.model = model

    def step(self, ids: Tensor) -> Tensor:
        return self.model.step(ids, self.cache)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_joining_leaving_and_reordering(model: Florence2Model, beams: int) -> None:
    rng, generator = random.Random(beams), torch.Generator().manual_seed(beams)
    slots = SlotCache(model.language_model.decoder, beams, 3, model.device)
    alone: list[Alone] = []
    joined = 0
    for _ in range(90):
        if len(alone) < 3 and (not alone or rng.random() < 0.2):
            memory = torch.randn(1, rng.randint(3, 90), model.config.text.d_model, generator=generator).double()
            assert list(slots.join(memory)) == [len(alone)]
            alone.append(Alone(model, memory, beams))
            joined += 1
        ids = torch.randint(3, 900, (len(alone), beams), generator=generator)
        logits = model.step(ids.flatten(), slots).view(len(alone), beams, -1)
        for own, row, newest in zip(alone, logits, ids, strict=True):
            torch.testing.assert_close(row, own.step(newest), atol=1e-5, rtol=1e-5)
        if rng.random() < 0.15:
            kept = fill_holes(len(alone), {i for i in range(len(alone)) if rng.random() < 0.5})
            slots.keep(torch.tensor(kept, dtype=torch.long))
            alone = [alone[i] for i in kept]
        if alone:
            parents = torch.randint(beams, (len(alone), beams), generator=generator)
            slots.reorder(parents)
            for own, row in zip(alone, parents, strict=True):
                own.cache.reorder(row[None])
        assert slots.positions == [own.cache.length for own in alone]
    assert joined > 8


@torch.no_grad()
def test_numbers_of_an_answer_that_left_cannot_spoil_a_later_one(model: Florence2Model) -> None:
    """Masked slots are multiplied by a weight of 0, and 0 times infinity is not 0."""
    slots = SlotCache(model.language_model.decoder, 2, 2, model.device)
    width = model.config.text.d_model
    slots.join(torch.full((1, 40, width), float("inf")).double())
    slots.join(torch.zeros(1, 50, width).double())
    for _ in range(5):
        model.step(torch.tensor([2, 2, 2, 2]), slots)
    slots.keep(torch.tensor([1]))
    slots.join(torch.zeros(1, 8, width).double())
    assert model.step(torch.tensor([2, 2, 2, 2]), slots).isfinite().all()


@torch.no_grad()
def test_an_empty_cache_starts_again(model: Florence2Model) -> None:
    slots = SlotCache(model.language_model.decoder, 1, 1, model.device)
    memory = torch.ones(1, 4, model.config.text.d_model).double()
    for _ in range(2):
        slots.join(memory)
        first = model.step(torch.tensor([2]), slots)
        slots.keep(torch.zeros(0, dtype=torch.long))
        assert slots.positions == [] and slots.projected == []
    torch.testing.assert_close(first, Alone(model, memory, 1).step(torch.tensor([2])))


def test_the_last_rows_fill_the_holes() -> None:
    assert fill_holes(5, {0, 3}) == [4, 1, 2]
    assert fill_holes(5, {3, 4}) == [0, 1, 2]
    assert fill_holes(3, {0, 1}) == [2]
    assert fill_holes(2, {0, 1}) == []
    assert fill_holes(6, {0, 1, 5}) == [3, 4, 2]
