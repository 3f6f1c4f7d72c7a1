"""Finished answers on their way out: those whose confidence was asked for are read again first, several together."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from florence2.errors import Florence2Error
from florence2.generation.engine.forced import read_again
from florence2.generation.engine.lane import Outcome
from florence2.generation.state import Generation
from florence2.model.florence2 import Florence2Model

Name = TypeVar("Name")
"""What the caller calls an answer."""
_TOGETHER = 8  # answers; two together take half the time of two alone, and more than eight gain nothing
_PATIENCE = 8  # steps that a finished answer waits for another one, where it should come soon


class Rereading(Generic[Name]):
    """Answers that are to be read again once they have ended, with their memories (1, S, D) until then."""

    def __init__(self, model: Florence2Model, locations: Sequence[int], soon: bool):
        """Read for `model`; `soon` says whether an answer should not have to wait until none runs."""
        self._model, self._locations, self.soon = model, locations, soon
        self._memories: dict[Name, Tensor] = {}
        self._finished: list[tuple[Name, Generation]] = []
        self._steps = 0  # since the first of them ended

    def __len__(self) -> int:
        """Count the finished answers that are yet to be read."""
        return len(self._finished)

    def expect(self, name: Name, memory: Tensor) -> None:
        """Read the answer `name` over `memory` again once it has ended."""
        self._memories[name] = memory

    def drop(self, unwanted: Callable[[Name], bool]) -> None:
        """Forget the answers whose names are `unwanted`."""
        self._finished = [each for each in self._finished if not unwanted(each[0])]
        self._memories = {name: memory for name, memory in self._memories.items() if not unwanted(name)}

    def settle(self, stopped: Sequence[tuple[Name, Outcome]], running: int) -> list[tuple[Name, Outcome]]:
        """Take the answers that stopped in a step; return those that need no reading, and those that were read."""
        settled: list[tuple[Name, Outcome]] = []
        for name, outcome in stopped:
            if name in self._memories and isinstance(outcome, Generation):
                self._finished.append((name, outcome))
            else:
                self._memories.pop(name, None)
                settled.append((name, outcome))
        if self._finished and self._is_due(running):
            finished, self._finished, self._steps = self._finished, [], 0
            settled += self._read(finished)
            for name, _ in finished:
                del self._memories[name]
        return settled

    def _is_due(self, running: int) -> bool:
        """Return whether there are enough finished answers to be read, or the first has waited long enough."""
        if not self.soon:
            return len(self._finished) >= _TOGETHER or not running
        self._steps += 1
        # where many answers run, the next one will soon have ended
        return len(self._finished) >= min(_TOGETHER, -(-running // 4)) or self._steps > _PATIENCE

    def _read(self, finished: Sequence[tuple[Name, Generation]]) -> list[tuple[Name, Outcome]]:
        """Read answers together; if that is refused, one by one, so that only the culprit fails."""
        parts = [(generation, self._memories[name]) for name, generation in finished]
        try:
            read: Sequence[Outcome] = read_again(self._model, parts, self._locations)
        except Florence2Error as error:  # of a module of the user's
            if len(finished) > 1:
                return [each for one in finished for each in self._read([one])]
            read = [error]
        return [(name, outcome) for (name, _), outcome in zip(finished, read, strict=True)]
