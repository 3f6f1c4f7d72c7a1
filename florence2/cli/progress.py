"""What a run shows: a progress bar on stderr, rows on stdout, and words for people.

Library functions take a `progress(done, total)` callback; only commands make a bar.
"""

import json
import sys
import time
from typing import TextIO

from florence2.bulk.rows import Row
from florence2.cli.options.arguments import say
from florence2.errors import OptionError

_LOG_SECONDS = 10.0  # between lines where they cannot overwrite each other


class Progress:
    """A line with `things` done, seconds each, and time left; silent for a single one.

    The object is itself a callback `progress(done, total)`, and a context manager that ends the line.
    """

    def __init__(self, total: int = 0, stream: TextIO | None = None, things: str = "images"):
        self.total, self.stream, self.things = total, stream or sys.stderr, things
        self.done = 0
        self.began = self.written = time.monotonic()
        self.on_terminal = self.stream.isatty()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done; 0 only sets the total."""
        self.total = total
        if done:
            self.show(done)

    def show(self, done: int) -> None:
        """Show how many are done."""
        self.done, now = done, time.monotonic()
        if self.total < 2 or not (self.on_terminal or now - self.written > _LOG_SECONDS):
            return
        self.written = now
        each = (now - self.began) / max(1, done)
        line = f"{done}/{self.total} {self.things}, {each:.2f} s each, {clock(each * (self.total - done))} left"
        print(f"\r{line}\x1b[K" if self.on_terminal else line, end="" if self.on_terminal else "\n", file=self.stream)
        self.stream.flush()

    def close(self) -> None:
        """End the line."""
        if self.on_terminal and self.total > 1:
            print(file=self.stream)


def clock(seconds: float) -> str:
    """Return "1:35" or "2:01:35"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Console:
    """Rows on stdout, as text for people or as JSON Lines for programs; failures as text on stderr.

    Where it is not `needed`, because the rows are in a folder too, a stdout that cannot be written ends nothing.
    `problems` then says so, unless the reader of a pipe has merely seen enough.
    """

    def __init__(self, as_json: bool, headings: bool, needed: bool = True):
        self.as_json, self.headings, self.needed = as_json, headings, needed
        self.problems: list[str] = []
        self._closed = False

    def __call__(self, row: Row) -> None:
        """Print one row."""
        self.report_drawing(row)
        if row.error is not None and not self.as_json:
            say(f"florence2: {_named(row.source.name, row.error)}")
        elif not self._closed:
            try:
                self._print(row)
            except (OSError, OptionError) as error:
                if self.needed:
                    raise
                self._closed = True
                if not isinstance(error, BrokenPipeError):
                    self.problems.append(f"{str(error).rstrip('.')}; the rows in --out are complete.")

    def report_drawing(self, row: Row) -> None:
        """Say why a row's answer could not be drawn, if it could not."""
        if row.drawing_error is not None:
            say(f"florence2: {_named(row.source.name, row.drawing_error)}")

    def _print(self, row: Row) -> None:
        if self.as_json:
            unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
            print(json.dumps(row.to_dict(), ensure_ascii=not unicode), flush=True)
        else:
            if self.headings:
                print(f"== {row.source.name}  {row.question.name}")
            print(row.answer, flush=True)


def _named(name: str, message: str) -> str:
    """Return a message that names the image."""
    return message if name in message else f"{name}: {message}"
