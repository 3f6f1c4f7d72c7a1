"""Encoded images, kept while they fit into a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FeatureCache(Generic[Item]):
    """Encoded images by the content of their image; those not used for longest leave first. Threads may share it."""

    def __init__(self, limit: int):
        """Keep at most `limit` bytes; 0 keeps nothing."""
        self.limit, self.bytes = limit, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[Item, int]] = OrderedDict()

    def __len__(self) -> int:
        """Count the images."""
        return len(self._kept)

    def get(self, key: Hashable) -> Item | None:
        """Return the encoded image, if it is kept."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def drop(self, is_over: Callable[[Item], bool]) -> None:
        """Forget images."""
        with self._lock:
            for key in [key for key, (item, _) in self._kept.items() if is_over(item)]:
                self.bytes -= self._kept.pop(key)[1]

    def put(self, key: Hashable, item: Item, size: int) -> None:
        """Keep an encoded image of `size` bytes, unless it alone is more than the limit."""
        with self._lock:
            if key in self._kept or size > self.limit:
                return
            self._kept[key], self.bytes = (item, size), self.bytes + size
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1][1]
