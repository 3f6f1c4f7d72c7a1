"""A run of `florence2 label`: from the remaining questions through decode workers and the model into the journal."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, cast

from florence2.asking.questions import Runtime
from florence2.bulk.answering import ImageQuestions, Rows
from florence2.bulk.rows import Row, TaskQuestion
from florence2.bulk.summary import Summary
from florence2.cli.main import EXIT_INCOMPLETE, EXIT_STOPPED
from florence2.cli.options.arguments import say
from florence2.cli.run import ask_tasks, finishing
from florence2.errors import OutputError
from florence2.label.ahead import Taken, Waited, read_ahead
from florence2.label.counting import Counting
from florence2.label.decoder import ReadSettings
from florence2.label.decoding import Decoders
from florence2.label.errors import ErrorLimit
from florence2.label.journal import Journal
from florence2.label.pace import Pace
from florence2.label.remaining import Remaining

if TYPE_CHECKING:
    from florence2.pipeline import Florence2

_AHEAD = 4  # times the batch: how many images are read before they are needed
_BATCH = 16  # where nobody says how many images are answered at once
_SHOWN_ERRORS = 10


class Labelling:
    """One run. The rows are written as they come; the next run finds the rest."""

    def __init__(
        self,
        options: argparse.Namespace,
        load: Callable[[argparse.Namespace], Runtime],
        remaining: Remaining,
        journal: Journal,
        counting: Counting | None = None,
    ):
        """Join the parts; `load` loads the model, and `counting` counts all images, where that costs little."""
        self._options, self._load, self._remaining, self._journal = options, load, remaining, journal
        self._limit: ErrorLimit | None = options.max_errors
        self._summary, self._pace, self._waited = Summary(options.max_new_tokens), Pace(), Waited()
        self._counting, self._hopeless = counting, False

    def run(self) -> int:
        """Answer the rest, and put the rows in order; return the exit code."""
        try:
            self._answer()
        except KeyboardInterrupt:
            self._pace.close()
            say(f"florence2: stopped; the rows written so far are kept in {self._journal.results}.")
            self._describe()
            return EXIT_STOPPED
        ordered = not self._hopeless and self._put_in_order()
        self._summary.rows += self._remaining.skipped
        self._describe()
        return 0 if ordered and self._summary.complete else EXIT_INCOMPLETE

    def compact(self) -> int:
        """Put the rows in order without answering anything; return the exit code."""
        self._remaining.take_all()
        return 0 if self._put_in_order(keep_failed=False) else EXIT_INCOMPLETE

    def _answer(self) -> None:
        """Answer the rest, unless there are too many errors."""
        work = iter(self._remaining)
        first = next(work, None)
        if finished := self._remaining.skipped:
            answers = "answer" if finished == 1 else f"{finished} answers"
            say(f"florence2: {self._journal.results} holds the first {answers} already.")
        if first is None:
            return
        model = self._load(self._options)
        ask = finishing(ask_tasks, model, self._options, self._options.batch)
        with self._reading(model, chain([first], work)) as taken, self._counting or nullcontext():
            self._pace = Pace()
            rows = Rows(model, taken, ask, batch_size=self._options.batch, progress=self._show)
            self._write(rows)

    @contextmanager
    def _reading(self, model: Runtime, work: Iterator[Taken]) -> Iterator[Iterator[ImageQuestions[TaskQuestion]]]:
        """Yield the images with their pixels, which other processes read; without any, the images as they are."""
        workers = self._options.workers
        if not workers:
            yield work
            return
        reading, room = _describe_reading(cast("Florence2", model))
        with Decoders(workers, reading, room) as decoders:
            most = _AHEAD * (self._options.batch or _BATCH)
            yield read_ahead(work, decoders, most, self._waited)

    def _write(self, rows: Rows[TaskQuestion]) -> None:
        """Write each row as it comes, and at a stop those that wait for a slower one before them."""
        try:
            for row in rows:
                self._keep(row)
                if self._limit and self._limit.is_exceeded(self._summary.failed, self._summary.rows):
                    self._hopeless = True
                    break
        except KeyboardInterrupt:
            self._keep_waiting(rows)
            raise
        self._keep_waiting(rows)

    def _keep_waiting(self, rows: Rows[TaskQuestion]) -> None:
        for row in rows.waiting():
            self._keep(row)

    def _keep(self, row: Row) -> None:
        self._journal(row)
        self._summary.add(row)
        if row.error is not None and self._summary.failed <= _SHOWN_ERRORS:
            named = row.error if row.source.name in row.error else f"{row.source.name}: {row.error}"
            more = " Further errors are in the rows alone." if self._summary.failed == _SHOWN_ERRORS else ""
            say(f"florence2: {named}{more}")

    def _show(self, finished: int) -> None:
        remaining, counted = self._remaining, self._counting and self._counting.total
        if remaining.complete:
            self._pace.total = remaining.left
        elif counted:
            self._pace.total = counted - (remaining.taken - remaining.left)
        self._pace(finished)

    def _put_in_order(self, keep_failed: bool = True) -> bool:
        try:
            others, failed = self._journal.compact(self._remaining.order, keep_failed)
        except OSError as error:  # an OutputError is one
            reason = str(error) if isinstance(error, OutputError) else f"{self._journal.folder}: {error.strerror}."
            say(f"florence2: {reason} The rows are complete, but not in input order; --compact orders them.")
            return False
        if failed and not keep_failed:
            were = "was" if failed == 1 else "were"
            say(f"florence2: {_count(failed, 'error')} about images not named here {were} taken out of the rows.")
            others, failed = others - failed, 0
        if others:
            errors = f" {_count(failed, 'error')} among them stay too; --compact takes such out." if failed else ""
            say(
                f"florence2: {self._journal.results} also holds {_count(others, 'row')} about other "
                "images or questions, or under ids that other arguments gave; `florence2 dataset` uses all, and "
                f"of those with one id and question the last.{errors}"
            )
        return True

    def _describe(self) -> None:
        """Say how the run went."""
        pace, summary = self._pace, self._summary
        pace.close()
        if self._hopeless:
            say("florence2: The run ended early, because --max-errors was exceeded; the same command resumes it.")
        for sentence in summary.sentences():
            say(f"florence2: {sentence}")
        if pace.done:
            share = f"; the model waited {self._waited.seconds / max(pace.seconds, 1e-9):.1%} of the time for images"
            say(f"florence2: {pace.describe()}{share if self._options.workers else ''}.")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _describe_reading(model: "Florence2") -> tuple[ReadSettings, int]:
    """Return how the model's images are read, and the bytes of the largest that is not resized where it is read."""
    from florence2.fast.cuda.pillow import pass_order
    from florence2.fast.cuda.pixels import MAX_DEVICE_PIXELS, MAX_DEVICE_SIDE, DevicePixels

    config, background = model.processor.image_config, model.processor.background
    if isinstance(model.choose_pixels(), DevicePixels) and pass_order() is not None:
        return ReadSettings(config, background, MAX_DEVICE_SIDE), 3 * MAX_DEVICE_PIXELS
    return ReadSettings(config, background), 0
