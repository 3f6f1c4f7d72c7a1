"""A lane of recorded steps: running answers with equal options in the rows of a bucket, which replays advance together.

The plain counterpart is `generation.engine.lane`, and for a batch that starts and is read at once, `generation.search`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.errors import Florence2Error
from florence2.fast.cuda.recorded.graphs import (
    DECODER,
    Recorder,
    StageWatch,
    recorder_for,
    recordings,
    stream_of,
    watch,
)
from florence2.fast.cuda.recorded.slots import ROWS, Bucket, Steps, row_indices
from florence2.generation.options import GenerationOptions
from florence2.generation.state import Generation, SpecialIds
from florence2.model.florence2 import Florence2Model

Name = TypeVar("Name")
"""What the caller calls an answer."""

_LATE = 2  # steps between copying the flags of what is done and reading them, so that the host never waits for a step
_SHRINK = 4  # buffers with this many times the rows that are needed are given up


@dataclass(eq=False)
class _Answer(Generic[Name]):
    """A running answer: the length of its memory, and the number of its next id."""

    name: Name
    length: int
    number: int = 1


class RecordedLane(Generic[Name]):
    """Running answers with equal options, each in a row of its own; see `generation.engine.lane.Lane`.

    Rows, memory and window grow by moving to the buffers of a larger bucket, and shrink when few answers are left. With
    `watched`, a change of the model is looked for before every step, and otherwise when answers join.
    """

    def __init__(
        self,
        model: Florence2Model,
        options: GenerationOptions,
        ids: SpecialIds,
        record: Recorder,
        now: StageWatch,
        watched: bool = True,
    ):
        self._model, self.options, self._ids = model, options, ids
        self._record, self._watched = record, watched
        self._steps: Steps | None = None
        self._rows: list[_Answer[Name] | None] = []  # of the bucket; None is idle
        self._late: deque[tuple[list[_Answer[Name] | None], Tensor, torch.cuda.Event | None]] = deque()
        self._watch = now

    def __len__(self) -> int:
        """Count the running answers."""
        return sum(answer is not None for answer in self._rows)

    def join(
        self, names: Sequence[Name], memory: Tensor, options: GenerationOptions, mask: Tensor | None = None
    ) -> None:
        """Start the answers `names` over `memory` (B, S, D); `mask` (B, S) is True at real positions."""
        assert options == self.options
        self._look()
        answers = [_Answer(name, memory.shape[1]) for name in names]
        steps = self._fit(answers)
        rows = [row for row, answer in enumerate(self._rows) if answer is None][: len(answers)]
        steps.join(rows, memory, mask)
        for row, answer in zip(rows, answers, strict=True):
            self._rows[row] = answer

    def drop(self, unwanted: Callable[[Name], bool]) -> None:
        """Stop the answers whose names are `unwanted`."""
        self._leave([row for row, answer in enumerate(self._rows) if answer is not None and unwanted(answer.name)])

    def step(self) -> list[tuple[Name, Generation | Florence2Error]]:
        """Choose the next id of every sequence; return answers that ended here or a few steps ago, which leave."""
        rows = self.advance()
        if not rows:
            return []
        names = [answer.name for row in rows if (answer := self._rows[row]) is not None]
        finished = self.finish(rows).split(len(rows))
        self._leave(rows)
        return list(zip(names, finished, strict=True))

    def advance(self) -> list[int]:
        """Advance all by one step; return the rows whose answers are known to have ended."""
        if self._watched:
            self._look()
        steps, limit = self._fit(()), self.options.max_new_tokens
        running = [answer for answer in self._rows if answer is not None]
        # the ids at the ends may be forced; the steps between have fewer rules to apply
        at_an_end = any(answer.number in (1, limit) for answer in running)
        numbers = range(1, 1 + limit) if at_an_end else range(2, limit)
        steps.advance(self._model, numbers, recorded=self._watch.reason is None)
        done = self._ask(steps.state.done)
        for answer in running:
            answer.number += 1
        return [
            row
            for row, answer in enumerate(self._rows)
            if answer is not None and (answer in done or answer.number > limit)
        ]

    def finish(self, rows: Sequence[int]) -> Generation:
        """Return the results of rows whose answers have ended."""
        assert self._steps is not None
        return self._steps.state.pick(row_indices(rows, self._model.device)).finish()

    def close(self) -> None:
        """Stop all answers."""
        self.drop(lambda _: True)

    def _look(self) -> None:
        """Find out whether the model has changed; what was recorded of another is not replayed."""
        before, self._watch = self._watch, watch(self._model, DECODER)
        if self._steps is not None and not self._watch.is_like(before):
            self._steps.forget()

    def _ask(self, done: Tensor) -> set[_Answer[Name]]:
        """Copy the flags (R,) of rows that are done; return the answers that were some steps ago."""
        on_cuda = done.device.type == "cuda"
        copy = torch.empty(done.shape, dtype=torch.bool, pin_memory=on_cuda)
        copy.copy_(done, non_blocking=True)
        event = None
        if on_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(done.device))
        self._late.append((list(self._rows), copy, event))
        if len(self._late) <= _LATE:
            return set()
        answers, flags, copied = self._late.popleft()
        if copied is not None:
            copied.synchronize()
        return {answer for answer, flag in zip(answers, flags.tolist(), strict=True) if flag and answer is not None}

    def _fit(self, joining: Sequence[_Answer[Name]]) -> Steps:
        """Return steps with room for what runs and joins, moved to other buffers if need be."""
        staying = [row for row, answer in enumerate(self._rows) if answer is not None]
        answers = [*(answer for answer in self._rows if answer is not None), *joining]
        longest, number = max(answer.length for answer in answers), max(answer.number for answer in answers)
        needed = Bucket.around(len(answers), longest, number, self.options.max_new_tokens)
        old = self._steps
        if old is not None and old.bucket.holds(needed) and old.bucket.rows < _SHRINK * needed.rows:
            return old
        self._steps = self._take(needed)
        if old is not None:
            self._steps.adopt(old, staying)
            self._give(old)
        rest = needed.rows - len(staying)
        self._rows = [*(self._rows[row] for row in staying), *[None] * rest]
        return self._steps

    def _leave(self, rows: Sequence[int]) -> None:
        if not rows or self._steps is None:
            return
        self._steps.leave(rows)
        for row in rows:
            self._rows[row] = None
        if not len(self):
            self._give(self._steps)
            self._steps, self._rows = None, []
            self._late.clear()

    def _take(self, bucket: Bucket) -> Steps:
        def make() -> Steps:
            return Steps(self._model, self.options, self._ids, bucket, self._record)

        return recordings(self._model).take(self._key(bucket), make)

    def _give(self, steps: Steps) -> None:
        if self._watch.reason is None:
            recordings(self._model).give(self._key(steps.bucket), steps, self._model.device)

    def _key(self, bucket: Bucket) -> tuple[object, ...]:
        return "steps", bucket, self.options, self._ids, self._record, stream_of(self._model.device), self._watch.key


def why_plain_options(options: GenerationOptions) -> str | None:
    """Return in words why steps with these options are not recorded; None if they may be."""
    if options.sample:
        return "sampling draws other numbers at each step"
    return "extra rules may look at values" if options.extra_rules else None


def open_lane(
    model: Florence2Model,
    options: GenerationOptions,
    ids: SpecialIds,
    watched: bool = True,
) -> "RecordedLane[Any] | None":
    """Return a lane of recorded steps; None where a step may not be recorded."""
    record = recorder_for(model.device)
    if record is None or why_plain_options(options) is not None:
        return None
    now = watch(model, DECODER)
    return RecordedLane(model, options, ids, record, now, watched) if now.reason is None else None


def search_recorded(
    model: Florence2Model,
    memory: Tensor,
    options: GenerationOptions,
    ids: SpecialIds,
    memory_mask: Tensor | None,
) -> Generation | None:
    """Return what `search` over `model.step` gives, by replay; None where a step may not be recorded."""
    lane: RecordedLane[int] | None = open_lane(model, options, ids, watched=False)
    if lane is None:
        return None
    parts = []
    for start in range(0, len(memory), ROWS[-1]):
        rows = slice(start, start + ROWS[-1])
        parts.append(_search_part(lane, memory[rows], None if memory_mask is None else memory_mask[rows]))
    return _joined(parts, ids.pad)


def _search_part(lane: RecordedLane[int], memory: Tensor, mask: Tensor | None) -> Generation:
    """Answer memories (B, S, D) that fit into one bucket together; all stay in their rows until the last has ended."""
    lane.join(range(len(memory)), memory, lane.options, mask)
    ended: set[int] = set()
    while len(ended) < len(memory):
        ended |= set(lane.advance())
    generation = lane.finish(range(len(memory)))
    lane.close()
    return generation


def _joined(parts: Sequence[Generation], pad: int) -> Generation:
    """Return the results of several batches as those of one."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.token_logprobs.shape[1] for part in parts)

    return Generation(
        torch.cat([F.pad(part.sequences, (0, 1 + longest - part.sequences.shape[1]), value=pad) for part in parts]),
        torch.cat([F.pad(part.token_logprobs, (0, longest - part.token_logprobs.shape[1])) for part in parts]),
        torch.cat([part.sequence_scores for part in parts]),
        torch.cat([part.lengths for part in parts]),
        tuple(reason for part in parts for reason in part.finish_reasons),
    )
