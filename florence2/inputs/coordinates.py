"""Convert pixels to location bins and back, for prompts, answers and training targets.

The model writes a coordinate as one of 1,000 bins of the image's width (x) or height (y). A pixel coordinate is floored
to its bin; a bin is converted back to its centre. Both are computed in float32, as in the reference, so that results
are equal bit for bit.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from florence2.errors import PromptError

NUM_BINS = 1000
LOCATION = re.compile(r"<loc_(\d{1,4})>")
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
    width, height = image_size
    try:
        x1, y1, x2, y2 = (float(value) for value in box)
    except (TypeError, ValueError):
        raise PromptError(f"A box must be four numbers (x1, y1, x2, y2) in pixels, not {box!r}.") from None
    if isinstance(box, str | bytes):
        raise PromptError(f"A box must be four numbers (x1, y1, x2, y2) in pixels, not the text {box!r}.")
    if not (x1 <= x2 and y1 <= y2):
        raise PromptError(
            f"Box {(x1, y1, x2, y2)} must have x1 <= x2 and y1 <= y2: left, top, right, bottom in pixels."
        )
    if x2 < 0 or y2 < 0 or x1 >= width or y1 >= height:
        raise PromptError(f"Box {(x1, y1, x2, y2)} is outside the image of {width} x {height} pixels.")
    return bins_to_tokens(pixels_to_bins((x1, y1, x2, y2), image_size))


def bins_to_tokens(bins: Iterable[int]) -> str:
    """Return the location tokens of the bins, such as "<loc_52><loc_332>"."""
    return "".join(f"<loc_{bin}>" for bin in bins)


def _rows(values: Any) -> np.ndarray:
    try:
        rows = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise PromptError(f"Coordinates must be rows of numbers of equal length, not {values!r}.") from None
    if rows.ndim == 0 or rows.shape[-1] % 2:
        raise PromptError(f"Coordinates must be pairs x, y, but the shape is {rows.shape}.")
    if not np.isfinite(rows).all():
        raise PromptError(f"Coordinates must be finite numbers, not {values!r}.")
    return rows


def _bin_sizes(rows: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    width, height = image_size
    if width < 1 or height < 1:
        raise PromptError(f"An image must be at least 1 x 1 pixels, not {width} x {height}.")
    # The reference divides Python floats and stores them in a float32 tensor: one rounding, at the end.
    return np.resize(np.array([width / NUM_BINS, height / NUM_BINS]), rows.shape[-1]).astype(np.float32)
