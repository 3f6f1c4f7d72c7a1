"""Images on their way through the model, as values: resized, and encoded."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A picture read and resized, which any thread can do while the model is at work on others.

    `pixel_values` (1, 3, H, W); `size` is (width, height) of the upright picture in pixels.
    """

    pixel_values: Tensor
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A picture after the vision tower, the expensive part; every task on it may start from here.

    `features` (1, N, D) on the model's device; `size` is (width, height) of the upright picture in pixels.
    """

    features: Tensor
    size: tuple[int, int]
