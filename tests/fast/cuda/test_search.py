"""The bookkeeping of beam search by a kernel: equal to the plain code to the bit, step after step."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from florence2.fast.cuda import search as fused
from florence2.fast.cuda.kernels import settle as kernel
from florence2.fast.cuda.kernels.availability import rehearsal
from florence2.fast.cuda.search import FusedBeamSearch, fuse
from florence2.generation.options import GenerationOptions
from florence2.generation.search import BeamSearch, start_search
from florence2.generation.state import SearchState, SpecialIds
from florence2.model.trace import Trace
from parity.cases import SETTINGS
from tests.release import keep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = SpecialIds()
VOCABULARY = 11  # so small that ends, repeats and ties are frequent


@pytest.fixture(autouse=True)
def _rehearsal() -> Iterator[None]:
    with torch.inference_mode(), rehearsal():
        yield


def logits_of(rows: int, step: int, ties: bool) -> Tensor:
    values = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(step)) * 3
    return (values.round() if ties else values).to(DEVICE)


def equal(one: SearchState, other: SearchState) -> bool:
    """Whether all tensors hold the same bits, NaN equal to NaN."""
    mine, theirs = one.tensors(), other.tensors()
    return all(
        value.dtype == theirs[name].dtype and torch.equal(value.nan_to_num(7e30), theirs[name].nan_to_num(7e30))
        if value.is_floating_point()
        else torch.equal(value, theirs[name])
        for name, value in mine.items()
    )


def states(B: int, room: int | None = None, **changes: Any) -> tuple[SearchState, SearchState]:
    plain = start_search(B, GenerationOptions().changed(**changes), IDS, DEVICE)
    plain = plain if room is None else plain.with_room(room)
    return plain, fuse(plain)


SHORT = {"max_new_tokens": 10, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
BEAMS = [
    dict(items)
    for items in dict.fromkeys(tuple(sorted({**changes, **SHORT}.items())) for changes in SETTINGS)
    if dict(items)["num_beams"] > 1
]
"""The settings that differ where answers are short and nothing else is forbidden."""


@pytest.mark.parametrize("changes", keep([1, 7], BEAMS), ids=str)
def test_every_step_is_that_of_the_plain_search(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    settle = kernel.settle

    def count(*arguments: Any) -> Any:
        steps.append(1)
        return settle(*arguments)

    monkeypatch.setattr(kernel, "settle", count)
    monkeypatch.setattr(kernel, "_CHUNK", 8)  # several chunks an answer
    plain, fast = states(2, **changes)
    assert type(fast) is FusedBeamSearch
    for n in range(1, 11):
        logits = logits_of(2 * changes["num_beams"], n, ties=n % 2 == 1)
        plain, fast = plain.advance(logits, n), fast.advance(logits, n)
        assert equal(plain, fast)
    assert len(steps) == 10
    one, other = plain.finish(), fast.finish()
    assert one.sequences.tolist() == other.sequences.tolist() and one.finish_reasons == other.finish_reasons
    assert torch.equal(one.sequence_scores, other.sequence_scores)


def test_inputs_at_steps_of_their_own() -> None:
    """As in the engine: others join, some leave, and the room grows."""
    plain, fast = states(2, room=4, num_beams=3, max_new_tokens=20)
    joining = states(1, room=4, num_beams=3, max_new_tokens=20)[0]
    numbers = [0, 0]
    for step in range(9):
        if step == 3:
            plain, fast, numbers = plain.with_room(12).join(joining.with_room(12)), fast.with_room(12), [*numbers, 0]
            fast = fast.join(joining.with_room(12))
        if step == 6:
            rows = torch.tensor([2, 0], device=DEVICE)
            plain, fast, numbers = plain.pick(rows), fast.pick(rows), [numbers[2], numbers[0]]
        numbers = [number + 1 for number in numbers]
        logits = logits_of(3 * len(numbers), step, ties=False)
        plain, fast = plain.advance(logits, numbers), fast.advance(logits, numbers)
        assert type(fast) is FusedBeamSearch and equal(plain, fast)


def test_rows_of_nan_stay_within_their_input() -> None:
    """What an idle row holds is never read, and must not reach memory that belongs to another."""
    plain, fast = states(3, num_beams=3, max_new_tokens=8)
    for n in range(1, 6):
        logits = logits_of(9, n, ties=False)
        logits[3:6] = float("nan")
        plain, fast = plain.advance(logits, n), fast.advance(logits, n)
        assert equal(plain, fast)


def test_where_the_plain_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    plain, fast = states(1, num_beams=2, max_new_tokens=3)
    monkeypatch.setattr(kernel, "settle", refuse)
    logits = logits_of(2, 1, ties=False)
    assert equal(plain.advance(logits, 1), fast.advance(logits, 1, Trace()))
    monkeypatch.setattr(fused, "MOST_BEAMS", 1)
    assert equal(plain.advance(logits, 1), fast.advance(logits, 1))
    monkeypatch.undo()
    monkeypatch.setattr(kernel, "settle", refuse)
    monkeypatch.setattr(fused, "why_no_kernel", lambda *_: "the package triton is missing")
    assert equal(plain.advance(logits, 1), fast.advance(logits, 1))


def test_only_beam_search_has_a_kernel() -> None:
    for changes in ({"num_beams": 1}, {"num_beams": 1, "sample": True}):
        state = states(1, **changes)[0]
        assert fuse(state) is state
    plain, fast = states(1, num_beams=2)
    assert type(plain) is BeamSearch and fuse(fast) is fast
