"""Being asked to stop: Ctrl-C, or the SIGTERM of a scheduler, is noted, and acted on between two updates."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MESSAGE = b"\nStopping behind this update, which will be saved. To stop at once, ask again in a second.\n"


class Stop:
    """What `asked_to_stop` gives: whether anybody has asked."""

    def __init__(self, apart: float, tell: bool):
        self._apart, self._tell = apart, tell
        self._noted: float | None = None
        self._at_once = False

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._noted is not None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block nothing is unsaved: KeyboardInterrupt for whoever asks, or has asked before."""
        if self.asked:
            raise KeyboardInterrupt
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The handler of the signals."""
        now = time.monotonic()
        if self._at_once or (self._noted is not None and now - self._noted >= self._apart):
            raise KeyboardInterrupt
        if self._noted is None:
            self._noted = now
            if self._tell:
                with suppress(OSError):
                    os.write(2, _MESSAGE)  # `print` may be what was interrupted


@contextmanager
def asked_to_stop(apart: float = 1.0, tell: bool = True) -> Iterator[Stop]:
    """Within the block the first SIGINT or SIGTERM is noted, and told to stderr; a later one breaks in.

    Later is `apart` seconds: a launcher passes on what a terminal has sent to the whole group already. A signal that
    was ignored, as Ctrl-C is by what runs in a script's background, stays so. Outside the main thread, which alone may
    listen to signals, nothing is noted. The handlers from before are back behind the block.
    """
    stop = Stop(apart, tell)
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, stop.note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_main_process() -> None:
    """In a worker process, which the main process ends: what stops a run is sent to all processes of its group."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
