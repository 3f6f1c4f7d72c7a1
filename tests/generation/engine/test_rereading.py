"""When finished answers are read again: several together, none left waiting."""

from typing import Any

import pytest
import torch

from florence2.errors import OptionError
from florence2.generation.engine import rereading
from florence2.generation.engine.rereading import Rereading
from florence2.generation.state import Generation

MEMORY = torch.zeros(1, 2, 4)


def ended(text: str = "a") -> Generation:
    return Generation(torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(1), torch.ones(1), (text,))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers were read together, each time."""
    parts: list[int] = []

    def read_again(_: Any, finished: list[tuple[Generation, Any]], __: Any) -> list[Generation]:
        parts.append(len(finished))
        if len(finished) > 1 and any(generation.finish_reasons == ("bad",) for generation, _ in finished):
            raise OptionError("together")
        if finished[0][0].finish_reasons == ("bad",):
            raise OptionError("alone")
        return [generation for generation, _ in finished]

    monkeypatch.setattr(rereading, "read_again", read_again)
    return parts


def of(names: str, soon: bool) -> "Rereading[str]":
    made: Rereading[str] = Rereading(None, (), soon)  # type: ignore[arg-type]
    for name in names:
        made.expect(name, MEMORY)
    return made


def names(settled: list[tuple[str, Any]]) -> str:
    return "".join(name for name, _ in settled)


def test_of_many_that_run_two_are_read_together(parts: list[int]) -> None:
    some = of("abc", soon=True)
    assert some.settle([("a", ended())], 7) == [] and len(some) == 1
    assert names(some.settle([("b", ended())], 7)) == "ab" and len(some) == 0
    assert some.settle([("c", ended())], 5) == [] and parts == [2]


@pytest.mark.parametrize("running", [0, 1, 4])
def test_of_few_each_is_read_at_once(parts: list[int], running: int) -> None:
    assert names(of("a", soon=True).settle([("a", ended())], running)) == "a" and parts == [1]


def test_none_waits_longer_than_eight_steps(parts: list[int]) -> None:
    some = of("abz", soon=True)
    for name in "ab":  # the steps are counted anew
        assert some.settle([(name, ended())], 60) == []
        for _ in range(7):
            assert some.settle([], 60) == []
        assert names(some.settle([], 60)) == name
    assert parts == [1, 1]


def test_for_the_most_answers_eight_are_read_together_or_the_last(parts: list[int]) -> None:
    some = of("abcdefghij", soon=False)
    assert some.settle([(name, ended()) for name in "abcdefg"], 1) == []
    assert names(some.settle([("h", ended())], 1)) == "abcdefgh"
    assert some.settle([("i", ended())], 1) == [] and names(some.settle([], 0)) == "i"
    assert parts == [8, 1]


def test_what_needs_no_reading_does_not_wait(parts: list[int]) -> None:
    some, error = of("ab", soon=False), OptionError("no")
    settled = some.settle([("x", ended()), ("a", error)], 3)  # nobody asked for x's confidence
    assert names(settled) == "xa" and settled[1][1] is error and not parts


def test_what_was_dropped_is_not_read(parts: list[int]) -> None:
    some = of("ab", soon=False)
    some.settle([("a", ended()), ("b", ended())], 1)
    some.drop(lambda name: name == "a")
    assert names(some.settle([], 0)) == "b" and parts == [1]


def test_an_error_stays_with_its_answer(parts: list[int]) -> None:
    settled = dict(of("ab", soon=False).settle([("a", ended("bad")), ("b", ended())], 0))
    assert str(settled["a"]) == "alone" and isinstance(settled["b"], Generation) and parts == [2, 1, 1]
