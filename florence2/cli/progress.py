"""The progress bar, on stderr. Library functions take a `progress(done, total)` callback; only commands make a bar."""

import sys
import time
from typing import TextIO

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
        line = f"{done}/{self.total} {self.things}, {each:.2f} s each, {_clock(each * (self.total - done))} left"
        print(f"\r{line}\x1b[K" if self.on_terminal else line, end="" if self.on_terminal else "\n", file=self.stream)
        self.stream.flush()

    def close(self) -> None:
        """End the line."""
        if self.on_terminal and self.total > 1:
            print(file=self.stream)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
