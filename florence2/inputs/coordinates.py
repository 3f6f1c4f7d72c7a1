"""Convert pixels to location bins and back, for prompts, answers and training targets.

The model writes a coordinate as one of 1,000 bins of the image's width (x) or height (y). A pixel coordinate is floored
to its bin; a bin is converted back to its centre. Both are computed in float32, as in the reference, so that results
are equal bit for bit.
"""

import math
import re
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from numbers import Real
from typing import Any

import numpy as np

from florence2.errors import PromptError, shown

NUM_BINS = 1000
MAX_IMAGE_SIDE = 10**9  # pixels; no image is larger
LOCATION = re.compile(r"<loc_([0-9]{1,4})>")
"""A location token in a text. The model has none of more than three digits, and no longer number is read as one."""


def pixels_to_bins(coordinates: Any, image_size: tuple[int, int]) -> list[Any]:
    """Convert pixel coordinates to location bins.

    Args:
        coordinates: Numbers x, y, x, y, ... of one box, quad or polygon, or nested rows of them of shape (..., 2n).
        image_size: (width, height) of the image in pixels.

    Returns:
        Lists of the same shape with integers 0..999. A coordinate outside the image gets the bin at its border.

    Raises:
        PromptError: A row has an odd length, a value is not finite, or the image is empty.
    """
    values = _rows(coordinates)
    bins = np.floor(values / _bin_sizes(values, image_size))
    result: list[Any] = np.clip(bins, 0, NUM_BINS - 1).astype(np.int64).tolist()
    return result


def bins_to_pixels(bins: Any, image_size: tuple[int, int]) -> list[Any]:
    """Convert location bins to the pixel coordinates of their centres.

    This inverts `pixels_to_bins` up to half a bin.

    Args:
        bins: Numbers 0..999 in the order x, y, x, y, ..., or nested rows of them of shape (..., 2n).
        image_size: (width, height) of the image in pixels.

    Returns:
        Lists of the same shape with floats.

    Raises:
        PromptError: A row has an odd length, a value is not finite, or the image is empty.
    """
    values = _rows(bins)
    result: list[Any] = ((values + np.float32(0.5)) * _bin_sizes(values, image_size)).tolist()
    return result


def box_to_tokens(box: Any, image_size: tuple[int, int]) -> str:
    """Convert a box to the location tokens that region tasks take.

    Args:
        box: x1, y1, x2, y2 in pixels: left, top, right, bottom. Parts outside the image are cut off.
        image_size: (width, height) of the image in pixels.

    Returns:
        Four location tokens, such as "<loc_52><loc_332><loc_932><loc_774>".

    Raises:
        PromptError: The box is not four numbers, its corners are swapped, or it is completely outside the image.
    """
    x1, y1, x2, y2 = read_box(box)
    width, height = check_image_size(image_size)
    if x2 < 0 or y2 < 0 or x1 >= width or y1 >= height:
        raise PromptError(f"Box {(x1, y1, x2, y2)} is outside the image of {width} x {height} pixels.")
    inside = (max(x1, 0), max(y1, 0), min(x2, width), min(y2, height))
    return bins_to_tokens(pixels_to_bins(inside, image_size))


def read_box(box: Any) -> tuple[float, float, float, float]:
    """Return a box as four floats. Raises PromptError unless they are finite, with x1 <= x2 and y1 <= y2."""
    try:
        if isinstance(box, str | bytes | bytearray | memoryview):
            raise TypeError
        x1, y1, x2, y2 = (float(value) for value in box)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for a tensor without values
        raise PromptError(
            f"A box must be four numbers (x1, y1, x2, y2) in pixels, as large as floats at most, not {shown(box)}."
        ) from None
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or not (x1 <= x2 and y1 <= y2):
        raise PromptError(
            f"Box {(x1, y1, x2, y2)} must have x1 <= x2 and y1 <= y2: left, top, right, bottom in pixels."
        )
    return x1, y1, x2, y2


def check_image_size(image_size: Any) -> tuple[int, int]:
    """Return (width, height) as Python's numbers. Raises PromptError unless both are pixels of at least 1."""
    try:
        width, height = image_size
        ordered = not isinstance(image_size, AbstractSet | bytes | bytearray)
        if ordered and all(isinstance(side, Real) and 1 <= float(side) <= MAX_IMAGE_SIDE for side in (width, height)):
            return _plain(width), _plain(height)
    except (TypeError, ValueError, OverflowError):
        pass
    raise PromptError(
        f"An image's size must be (width, height), at least 1 x 1 pixels and at most {MAX_IMAGE_SIDE:,} each, not "
        f"{shown(image_size)}."
    )


def _plain(side: Any) -> Any:
    """Return a number of NumPy or another library as Python's, which JSON can hold."""
    return int(side) if side == int(side) else float(side)


def bins_to_tokens(bins: Iterable[int]) -> str:
    """Return the location tokens of the bins, such as "<loc_52><loc_332>"."""
    return "".join(f"<loc_{bin}>" for bin in bins)


def _rows(values: Any) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, and are refused below
            rows = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for a tensor without values
        raise PromptError(f"Coordinates must be rows of numbers of equal length, not {shown(values)}.") from None
    if rows.ndim == 0 or rows.shape[-1] % 2:
        raise PromptError(f"Coordinates must be pairs x, y, but the shape is {rows.shape}.")
    if not np.isfinite(rows).all():
        raise PromptError(f"Coordinates must be finite numbers, not {shown(values)}.")
    return rows


def _bin_sizes(rows: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    width, height = check_image_size(image_size)
    # The reference divides Python floats and stores them in a float32 tensor: one rounding, at the end.
    return np.resize(np.array([width / NUM_BINS, height / NUM_BINS]), rows.shape[-1]).astype(np.float32)
