"""Encoded images, kept while they fit into a number of bytes."""

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor


class FeatureCache:
    """Image tokens by the content of their image; those that were not used for longest leave first."""

    def __init__(self, limit: int):
        """Keep at most `limit` bytes; 0 keeps nothing."""
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        """Count the images."""
        return len(self._kept)

    def get(self, key: Hashable) -> Tensor | None:
        """Return the image tokens of an image, (1, N, D), if they are kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, features: Tensor) -> None:
        """Keep the image tokens of an image, unless they alone are more than the limit."""
        size = features.numel() * features.element_size()
        if key in self._kept or size > self.limit:
            return
        self._kept[key], self.bytes = features, self.bytes + size
        while self.bytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= oldest.numel() * oldest.element_size()
