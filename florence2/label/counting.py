"""The number of images of a run, counted while it works, for the time that is left."""

import threading
import time
from collections.abc import Iterable

from florence2.label.sources.item import Item

_PAUSE_AFTER, _PAUSE_SECONDS = 100, 0.001  # so that the model hardly notices


class Counting:
    """Counts images in a thread of its own. `total` is None until it has ended."""

    total: int | None = None

    def __init__(self, items: Iterable[Item]):
        self._items, self._stopped = items, threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> "Counting":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _count(self) -> None:
        count = 0
        try:
            for _ in self._items:
                count += 1
                if count % _PAUSE_AFTER == 0:
                    time.sleep(_PAUSE_SECONDS)
                    if self._stopped.is_set():
                        return
        except Exception:  # noqa: BLE001  the run meets the same error, and reports it
            return
        self.total = count
