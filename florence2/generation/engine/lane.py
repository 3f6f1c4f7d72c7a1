"""Running answers of one number of beams: one step of the decoder for all, a search state for each kind of options."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from florence2.errors import Florence2Error
from florence2.generation.engine.slots import SlotCache
from florence2.generation.options import GenerationOptions
from florence2.generation.search import start_search
from florence2.generation.state import Generation, SearchState, SpecialIds
from florence2.model.cache import DecoderCache
from florence2.model.florence2 import Florence2Model

Name = TypeVar("Name")
"""What the caller calls an answer."""
Outcome = Generation | Florence2Error
"""How an answer ended: with its result, or why there is none."""


@runtime_checkable
class PreparesSteps(Protocol):
    """A model whose steps can be made faster for a number of rows."""

    def prepare_steps(self, cache: DecoderCache, rows: int) -> None:
        """Prepare the next steps over `cache`, of about `rows` rows."""
        ...


class OwnLane(Protocol[Name]):
    """A lane that a model brings, for answers with equal options; its methods are those of `Lane`.

    The prompts of those that join together may be padded: what the model brings is as fast with a mask.
    """

    def __len__(self) -> int: ...

    def join(
        self, names: Sequence[Name], memory: Tensor, options: GenerationOptions, mask: Tensor | None = None
    ) -> None: ...

    def drop(self, unwanted: Callable[[Name], bool]) -> None: ...

    def step(self) -> list[tuple[Name, Outcome]]: ...


@runtime_checkable
class OpensLanes(Protocol):
    """A model that can advance answers itself, sooner."""

    def open_lane(self, options: GenerationOptions, ids: SpecialIds) -> OwnLane[Any] | None:
        """Return a lane for answers with these options, or None where this does not apply now."""
        ...


@dataclass
class _Group(Generic[Name]):
    """The running answers with equal options. `rows` says where each stands among all that run, ascending."""

    state: SearchState
    names: list[Name] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


class Lane(Generic[Name]):
    """Up to `slots` running answers of `width` sequences each, which the decoder advances together."""

    def __init__(self, model: Florence2Model, width: int, slots: int, ids: SpecialIds):
        self._model, self._width, self._ids = model, width, ids
        self._cache = SlotCache(model.language_model.decoder, width, slots, model.device)
        self._groups: list[_Group[Name]] = []
        self._prepared_for = 0  # rows, rounded up to a power of two

    def __len__(self) -> int:
        """Count the running answers."""
        return len(self._cache.positions)

    def join(
        self, names: Sequence[Name], memory: Tensor, options: GenerationOptions, mask: Tensor | None = None
    ) -> None:
        """Start the answers `names` over `memory` (B, S, D); `mask` (B, S) bool is True at real positions."""
        if mask is not None:
            for i, name in enumerate(names):
                self.join([name], memory[i, mask[i]][None], options)
            return
        rows = self._cache.join(memory)
        state = start_search(len(memory), options, self._ids, memory.device)
        group = next((group for group in self._groups if group.state.options == options), None)
        if group is None:
            self._groups.append(group := _Group(state))
        else:
            group.state = group.state.join(state.with_room(group.state.room))
        group.names += names
        group.rows += rows

    def written(self, name: Name) -> list[int]:
        """Return the ids, the start id first, that the first sequence of a running answer has; none of others."""
        for group in self._groups:
            if name in group.names:
                return group.state.written(group.names.index(name))
        return []

    def drop(self, unwanted: Callable[[Name], bool]) -> None:
        """Stop the answers whose names are `unwanted`."""
        leaving = {
            row for group in self._groups for name, row in zip(group.names, group.rows, strict=True) if unwanted(name)
        }
        if leaving:
            self._keep(fill_holes(len(self), leaving))

    def step(self) -> list[tuple[Name, Outcome]]:
        """Choose the next id of every sequence; return the answers that this ends, which leave."""
        self._prepare()
        newest = self._gather(lambda state: state.newest)
        logits = self._model.step(newest.flatten(), self._cache).view(len(self), self._width, -1)  # (B, K, V)
        numbers = list(self._cache.positions)  # the number of the id that each answer's logits are about
        ended: list[tuple[Name, int, Outcome]] = []
        for group in self._groups:
            part = logits if len(self._groups) == 1 else logits[group.rows]
            ended += _advance(group, part, [numbers[row] for row in group.rows])
        parents = self._gather(lambda state: state.parents)
        if ended:
            kept = fill_holes(len(self), {row for _, row, _ in ended})
            parents = parents[kept]
            self._keep(kept)
        if len(self):
            self._cache.reorder(parents)
        return [(name, outcome) for name, _, outcome in ended]

    def _prepare(self) -> None:
        """Prepare the model's steps when the number of rows has changed by much, or the lane was empty."""
        rows = 1 << (len(self) * self._width - 1).bit_length()
        if rows != self._prepared_for and isinstance(self._model, PreparesSteps):
            self._model.prepare_steps(self._cache, rows)
            self._prepared_for = rows

    def _gather(self, read: Callable[[SearchState], Tensor]) -> Tensor:
        """Return a value of every group's state (B', K), put together in the order of the rows: (B, K)."""
        values = torch.cat([read(group.state) for group in self._groups])
        if len(self._groups) == 1:
            return values
        order = torch.tensor([row for group in self._groups for row in group.rows], device="cpu")
        return values[order.argsort().to(values.device)]

    def _keep(self, kept: list[int]) -> None:
        """Continue with the rows `kept` alone, in this order."""
        place = {row: i for i, row in enumerate(kept)}
        for group in self._groups:
            by_place = sorted((place[row], i) for i, row in enumerate(group.rows) if row in place)
            staying = [i for _, i in by_place]
            if staying != list(range(len(group.rows))):
                group.state = group.state.pick(torch.tensor(staying, dtype=torch.long, device=self._model.device))
                group.names = [group.names[i] for i in staying]
            group.rows = [row for row, _ in by_place]
        self._groups = [group for group in self._groups if group.rows]
        self._cache.keep(torch.tensor(kept, dtype=torch.long, device=self._model.device))
        if not kept:
            self._prepared_for = 0  # the weights may change before the next answer


def fill_holes(count: int, leaving: set[int]) -> list[int]:
    """Return which of `count` rows continue, the last ones in the places of those that leave: few move."""
    left = count - len(leaving)
    movers = (row for row in range(left, count) if row not in leaving)
    return [next(movers) if row in leaving else row for row in range(left)]


def _advance(group: _Group[Name], logits: Tensor, numbers: Sequence[int]) -> Iterator[tuple[Name, int, Outcome]]:
    """Advance a group by `logits` (B, K, V); yield name, row and outcome of each answer that ends."""
    group.state = group.state.with_room_for(max(numbers))
    try:
        group.state = group.state.advance(logits.flatten(0, 1), numbers)
        failed: dict[int, Florence2Error] = {}
    except Florence2Error:  # a rule of somebody's own left an answer nothing to continue with
        group.state, failed = _advance_each(group.state, logits, numbers)
    limit = group.state.options.max_new_tokens
    done = [i for i, done in enumerate(group.state.done.tolist()) if (done or numbers[i] == limit) and i not in failed]
    if done:
        finished = group.state.pick(torch.tensor(done, device=logits.device)).finish()
        for i, generation in zip(done, finished.split(len(done)), strict=True):
            yield group.names[i], group.rows[i], generation
    for i, error in failed.items():
        yield group.names[i], group.rows[i], error


def _advance_each(
    state: SearchState, logits: Tensor, numbers: Sequence[int]
) -> tuple[SearchState, dict[int, Florence2Error]]:
    """Advance the inputs one by one; return the state, and the error of each that cannot continue."""
    failed = {}
    for i, number in enumerate(numbers):
        row = torch.tensor([i], device=logits.device)
        try:
            state = state.put(row, state.pick(row).advance(logits[i], [number]))
        except Florence2Error as error:
            failed[i] = error
    return state, failed
