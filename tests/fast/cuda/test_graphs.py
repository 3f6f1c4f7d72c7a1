"""Generation by replay, with calling in the place of recording: all but the CUDA graph itself."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from florence2.fast.cuda import graphs as graphed
from florence2.fast.cuda.graphs import StaticCache, generate_graphed
from florence2.fast.install import install
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.generation.state import Generation, SpecialIds
from florence2.model.florence2 import Florence2Model
from parity.cases import SETTINGS, shapes
from parity.recipe import make_model
from tests.slow_search import search_slowly


@pytest.fixture(scope="module")
def model() -> Florence2Model:
    shape = shapes()[3]
    return make_model(shape.config, shape.seed, shape.end_bonus)


@pytest.fixture(scope="module")
def memory() -> Tensor:
    return torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(4))


def call_again(work: Callable[[], None]) -> Callable[[], None]:
    return work


@torch.inference_mode()
def replayed(
    model: Florence2Model, memory: Tensor, options: GenerationOptions, mask: Tensor | None = None
) -> Generation:
    found = generate_graphed(install(model), memory, options, SpecialIds(), mask, record=call_again)
    assert found is not None
    return found


def same(one: Generation, other: Generation) -> bool:
    return (
        one.sequences.tolist() == other.sequences.tolist()
        and one.finish_reasons == other.finish_reasons
        and torch.allclose(one.token_logprobs, other.token_logprobs, atol=1e-3)
        and torch.allclose(one.sequence_scores, other.sequence_scores, atol=1e-3)
    )


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_same_as_the_search(
    model: Florence2Model, memory: Tensor, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed, "_FIRST_WINDOW", 4)  # several windows within the first tokens
    options = GenerationOptions().changed(**changes)
    expected = generate(model, memory, options)
    assert same(replayed(model, memory, options), expected)


def test_an_untied_model_is_replayed(model: Florence2Model, memory: Tensor) -> None:
    """A replay recorded before is not used again, and the weights of its own are read."""
    untied, options = copy.deepcopy(model), GenerationOptions(num_beams=2, max_new_tokens=8)
    tied = replayed(untied, memory, options)
    shared = untied.language_model.shared.weight.detach()
    untied.untie_head(shared.flip(0))
    untied.untie_answers(shared.roll(7, 0))
    found, expected = replayed(untied, memory, options), generate(untied, memory, options)
    assert same(found, expected) and not same(found, tied)


def test_a_generator_serves_again(model: Florence2Model, memory: Tensor) -> None:
    """Nothing of one call is left in the next, whatever its mask."""
    options = GenerationOptions(max_new_tokens=12)
    masks = [torch.ones(3, 9, dtype=torch.bool), torch.tensor([[True] * 5 + [False] * 4] * 3)]
    graphed._idle.pop(model, None)
    for scale, mask in ((1.0, masks[0]), (2.0, masks[1]), (1.0, masks[1])):
        assert same(replayed(model, memory * scale, options, mask), generate(model, memory * scale, options, mask))
    assert len(graphed._idle[model]) == 1
    replayed(model, memory, options.changed(num_beams=2))
    replayed(model, memory, options.changed(num_beams=1))
    assert len(graphed._idle[model]) == graphed._KEPT


@torch.inference_mode()
def test_a_mask_is_not_ignored_by_a_generator_that_was_made_without_one(model: Florence2Model, memory: Tensor) -> None:
    """A call without a mask, one of the same shape with one, and the first again."""
    memory = memory[:1]  # the search that it is compared with takes its time
    options = GenerationOptions(max_new_tokens=4, num_return_sequences=3)
    mask = torch.tensor([[True] * 5 + [False] * 4])
    graphed._idle.pop(model, None)
    found = [replayed(model, memory, options, each) for each in (None, mask, None)]
    expected = [search_slowly(model, memory, options, each) for each in (None, mask)]
    assert expected[0] != expected[1]
    for generation, rows in zip(found, (*expected, expected[0]), strict=True):
        assert [
            row[: 1 + length] for row, length in zip(generation.sequences.tolist(), generation.lengths, strict=True)
        ] == rows


def test_generate_replays_where_that_is_possible(
    model: Florence2Model, memory: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate` gives an installed model its whole search, with memory, options, ids and mask in their places."""

    def on_the_cpu(*arguments: Any) -> Generation | None:
        calls.append(arguments)
        return generate_graphed(*arguments, record=call_again)

    calls: list[tuple[Any, ...]] = []
    mask = torch.tensor([[True] * 5 + [False] * 4] * 3)
    options = GenerationOptions(max_new_tokens=8)
    expected = generate(model, memory, options, mask)
    monkeypatch.setattr("florence2.fast.install.generate_graphed", on_the_cpu)
    assert same(generate(install(model), memory, options, mask), expected) and len(calls) == 1


class OwnRule:
    """A rule that may look at values, as far as anybody knows."""

    name = "own"

    def applies(self, generated: int) -> bool:
        return generated > 0

    def __call__(self, scores: Tensor, sequences: Tensor, generated: Tensor) -> Tensor:
        return scores if int(generated.max()) < 99 else scores * 2


@torch.inference_mode()
@pytest.mark.parametrize("changes", [{"sample": True}, {"extra_rules": (OwnRule(),)}], ids=["sample", "extra_rules"])
def test_samples_and_rules_of_ones_own_are_not_recorded(
    model: Florence2Model, memory: Tensor, changes: dict[str, Any]
) -> None:
    """A recorded step would draw the numbers of the first call again, and not look at values."""
    plain = GenerationOptions(max_new_tokens=5, num_beams=1)
    replayed(model, memory, plain)
    options = plain.changed(**changes)
    assert generate_graphed(install(model), memory, options, SpecialIds(), record=call_again) is None


def test_every_kind_of_step_is_recorded_once(model: Florence2Model, memory: Tensor) -> None:
    """The first of a kind runs as it is, the second is recorded, the others are replayed."""
    recorded, replays = [], []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(work)

        def replay() -> None:
            replays.append(work)
            work()

        return replay

    options = GenerationOptions(max_new_tokens=40, min_new_tokens=39, num_beams=2)
    with torch.inference_mode():
        found = generate_graphed(install(model), memory, options, SpecialIds(), record=record)
    assert same(found, generate(model, memory, options))
    # forced begin; too short for an n-gram; the usual step; forced end
    assert len(recorded) == 1 and len(replays) == 40 - 4


def test_a_step_reads_and_writes_fixed_buffers_only(model: Florence2Model, memory: Tensor) -> None:
    """What a CUDA graph needs: after a step every tensor lies where it lay before."""
    cache = StaticCache(model.language_model.decoder, memory, 2, 20)

    def places() -> list[int]:
        own = [tensor for pair in cache.own for tensor in pair or ()]
        projected = [tensor for part in cache.projected for tensor in part[:2]]
        return [t.data_ptr() for t in (cache.ancestry, cache.position, cache.slots, *own, *projected) if t is not None]

    with torch.inference_mode():
        model.step(torch.tensor([5, 6] * 3), cache)
        before = places()
        for _ in range(2):
            model.step(torch.tensor([5, 6] * 3), cache)
            cache.reorder(torch.tensor([[0, 0], [1, 0], [1, 1]]))
    assert places() == before and int(cache.position) == 3


def test_another_model_in_the_same_place_is_not_served_by_it(model: Florence2Model, memory: Tensor) -> None:
    options = GenerationOptions(max_new_tokens=6)
    other = Florence2Model(replace(model.config)).eval()
    other.load_state_dict(model.state_dict())
    replayed(other, memory, options)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.data = parameter.data * 1.5
    assert same(replayed(other, memory, options), generate(other, memory, options))
