"""Processes that this one starts: a signal to all reaches it alone, and none outlives it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, parent_process


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Let a process that is started here not see Ctrl-C and SIGTERM, not even while it imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def when_parent_ends(act: Callable[[], object]) -> None:
    """Call `act`, in a thread, when the process that started this one has ended, even if it was killed."""

    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            connection.wait([parent.sentinel])
            act()

    threading.Thread(target=wait, daemon=True).start()
