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
        line = self._line()
        print(f"\r{line}\x1b[K" if self._terminal else line, end="" if self._terminal else "\n", file=self._stream)
        self._stream.flush()

    def describe(self) -> str:
        """Return "1200 images in 0:30, 40.0 images/s"."""
        images = f"{self.done} image{'' if self.done == 1 else 's'}"
        return f"{images} in {clock(self.seconds)}, {self.rate:.1f} images/s"

    def close(self) -> None:
        """Remove the line."""
        if self._terminal:
            print("\r\x1b[K", end="", file=self._stream)
            self._stream.flush()

    def _line(self) -> str:
        if self.total is None:
            return f"{self.done} images, {self.rate:.1f} images/s"
        left = clock((self.total - self.done) / max(self.rate, 1e-9))
        return f"{self.done}/{self.total} images, {self.rate:.1f} images/s, {left} left"
