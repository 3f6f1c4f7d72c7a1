"""Images on their way through the model, as values: resized, and encoded."""

from dataclasses import dataclass, field

from torch import Tensor

from florence2.inputs.image import ImageInput


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image that was read and resized, which any thread can do while the model computes.

    `pixel_values` (1, 3, H, W); `size` is (width, height) of the upright image in pixels. `source` is what the image
    was read from, unless that was the bytes of a file.
    """

    pixel_values: Tensor
    size: tuple[int, int]
    source: "ImageInput | None" = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image after the vision tower, the expensive part; every task on it can start from here.

    `features` (1, N, D) on the model's device; `size` is (width, height) of the upright image in pixels. `source` is
    what the image was read from, unless that was the bytes of a file.
    """

    features: Tensor
    size: tuple[int, int]
    source: "ImageInput | None" = field(default=None, repr=False, compare=False)
