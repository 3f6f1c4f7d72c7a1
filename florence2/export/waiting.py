"""Ctrl-C that waits: torch's tracer may swallow the exception of a signal, and the export would run to its end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block ends; then their own handlers get the first of them."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    seen: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        seen.append(number)

    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
    handlers = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if seen:
        signal.raise_signal(seen[0])
