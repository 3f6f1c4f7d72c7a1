"""The progress of a run: images, images a second, and the time left."""

import sys
import time
from typing import TextIO

from florence2.cli.progress import clock

_LOG_SECONDS = 30.0  # between lines where they cannot overwrite each other
_SHOW_SECONDS = 0.1


class Pace:
    """A line on a terminal that is written again; elsewhere a line now and then.

    Attributes:
        done: The number of images that this run has finished.
        total: The number of images that it will finish, once that is known.
    """

    done = 0
    total: int | None = None

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._began = self._last = self._shown = time.monotonic()
        self._terminal = self._stream.isatty()

    @property
    def seconds(self) -> float:
        """The time since the start, up to the last finished image."""
        return self._last - self._began

    @property
    def rate(self) -> float:
        """Images a second since the start."""
        return self.done / max(self.seconds, 1e-9)

    def __call__(self, done: int) -> None:
        """Show that so many images are finished."""
        self.done, self._last = done, time.monotonic()
        now = self._last
        if now - self._shown < (_SHOW_SECONDS if self._terminal else _LOG_SECONDS):
            return
        self._shown = now
        line = self.describe()
        print(f"\r{line}\x1b[K" if self._terminal else line, end="" if self._terminal else "\n", file=self._stream)
        self._stream.flush()

    def describe(self) -> str:
        """Return the line: "1200/5000 images, 40.0 images/s, 1:35 left"."""
        of_all = "" if self.total is None else f"/{self.total}"
        left = "" if self.total is None else f", {clock((self.total - self.done) / max(self.rate, 1e-9))} left"
        return f"{self.done}{of_all} images, {self.rate:.1f} images/s{left}"

    def close(self) -> None:
        """End the line."""
        if self._terminal and self.done:
            print(f"\r{self.describe()}\x1b[K", file=self._stream)
