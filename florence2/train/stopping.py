"""Stop a run on Ctrl-C or a scheduler's SIGTERM, between two updates, so that no update is lost."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MESSAGE = b"\nFinishing this update and saving. Press Ctrl-C again to stop immediately.\n"


class StopRequest:
    """A request to stop the run, made by a signal. `catch_stop_signals` creates the object."""

    def __init__(self, apart: float, announce: bool):
        self._apart, self._announce = apart, announce
        self._first_signal: float | None = None
        self._immediate = False

    @property
    def received(self) -> bool:
        """Return whether a signal has come."""
        return self._first_signal is not None

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Within the block nothing is unsaved: raise KeyboardInterrupt on any signal, and for one received before."""
        if self.received:
            raise KeyboardInterrupt
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False

    def handle(self, signal_number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Handle a signal."""
        now = time.monotonic()
        if self._immediate or (self._first_signal is not None and now - self._first_signal >= self._apart):
            raise KeyboardInterrupt
        if self._first_signal is None:
            self._first_signal = now
            if self._announce:
                with suppress(OSError):
                    os.write(2, _MESSAGE)  # the signal may have interrupted `print`, which cannot be entered twice


@contextmanager
def catch_stop_signals(apart: float = 1.0, announce: bool = True) -> Iterator[StopRequest]:
    """Within the block, note the first SIGINT or SIGTERM and say so on stderr; raise KeyboardInterrupt on a second.

    A second signal counts only `apart` seconds after the first: a launcher may forward the Ctrl-C that the terminal
    already sent to every process. Signals that were ignored before stay ignored, as Ctrl-C is in a script's background
    jobs. Nothing is caught outside the main thread, because only that may set handlers. The earlier handlers return
    after the block.
    """
    request = StopRequest(apart, announce)
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, request.handle)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """Ignore both signals, in a worker process: every process of the group gets them, and the main one ends workers."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
