"""Encoded images by the hash of their bytes, kept while they fit into a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Hashable

from florence2.asking.requests import EncodedImage


class EncodedCache:
    """Encoded images; those that were not used for longest leave first. Threads may share it."""

    def __init__(self, limit: int):
        """Keep at most `limit` bytes; 0 keeps nothing."""
        self.limit, self.bytes = limit, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, EncodedImage] = OrderedDict()

    def __len__(self) -> int:
        """Count the images."""
        return len(self._kept)

    def get(self, key: Hashable) -> EncodedImage | None:
        """Return the image, if it is kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, image: EncodedImage) -> None:
        """Keep an image, unless it alone is more than the limit."""
        size = encoded_bytes(image)
        with self._lock:
            if key in self._kept or size > self.limit:
                return
            self._kept[key], self.bytes = image, self.bytes + size
            while self.bytes > self.limit:
                self.bytes -= encoded_bytes(self._kept.popitem(last=False)[1])


def encoded_bytes(image: EncodedImage) -> int:
    """Return the bytes of an image's features."""
    return int(image.features.numel() * image.features.element_size())
