"""Being asked to stop: Ctrl-C, or the SIGTERM of a scheduler, is noted, and acted on between two updates."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_MESSAGE = b"\nStopping behind this update, which is saved; once more stops at once.\n"


@contextmanager
def asked_to_stop(apart: float = 1.0) -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGINT or SIGTERM makes the value it gives answer True; a later one breaks in.

    Later is `apart` seconds: a launcher passes on what a terminal has sent to the whole group already. Outside the
    main thread, which alone may listen to signals, it answers False always. The handlers from before are back behind
    the block.
    """
    noted: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if not noted:
            noted.append(time.monotonic())
            with suppress(OSError):
                os.write(2, _MESSAGE)  # `print` may be what was interrupted
        elif time.monotonic() - noted[0] >= apart:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_main_process() -> None:
    """In a worker process: Ctrl-C reaches the whole group, and SIGTERM ends this process as it usually does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
