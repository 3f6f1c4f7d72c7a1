"""Pixels <-> location bins: the one quantiser for prompts, answers and training targets.

A coordinate is written as one of 1,000 bins of the picture's width (x) or height (y). Going in, a pixel coordinate
is floored to its bin; coming out, a bin stands for its centre. Both are computed in float32, as in the reference,
so that equal input gives equal bits.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from florence2.errors import PromptError

NUM_BINS = 1000
LOCATION = re.compile(r"<loc_(\d+)>")


def pixels_to_bins(coordinates: Any, image_size: tuple[int, int]) -> list[Any]:
    """Pixel coordinates -> location bins, integers 0..999.

    `coordinates`: numbers x, y, x, y, ... of one box, quad or polygon, or any nesting of such rows; the last axis
    must be even. `image_size`: (width, height) in pixels. Coordinates outside the picture go to its border bin.
    Returns (nested) lists of the same shape. Raises PromptError for odd rows, non-finite values, empty pictures.
    """
    values = _rows(coordinates)
    bins = np.floor(values / _bin_sizes(values, image_size))
    result: list[Any] = np.clip(bins, 0, NUM_BINS - 1).astype(np.int64).tolist()
    return result


def bins_to_pixels(bins: Any, image_size: tuple[int, int]) -> list[Any]:
    """Location bins -> pixel coordinates of the bin centres, floats; the inverse of `pixels_to_bins` up to half a bin.

    Shapes and errors as there.
    """
    values = _rows(bins)
    result: list[Any] = ((values + np.float32(0.5)) * _bin_sizes(values, image_size)).tolist()
    return result


def box_to_tokens(box: Any, image_size: tuple[int, int]) -> str:
    """A box (x1, y1, x2, y2) in pixels -> its region prompt, "<loc_52><loc_332><loc_932><loc_774>".

    Raises PromptError when the box is not four numbers, has its corners swapped, or lies outside the picture.
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
        raise PromptError(f"Box {(x1, y1, x2, y2)} lies outside the picture of {width} x {height} pixels.")
    return bins_to_tokens(pixels_to_bins((x1, y1, x2, y2), image_size))


def bins_to_tokens(bins: Iterable[int]) -> str:
    """Location bins -> the tokens that name them, "<loc_52><loc_332>..."."""
    return "".join(f"<loc_{bin}>" for bin in bins)


def _rows(values: Any) -> np.ndarray:
    try:
        rows = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise PromptError(f"Coordinates must be rows of numbers of equal length, not {values!r}.") from None
    if rows.ndim == 0 or rows.shape[-1] % 2:
        raise PromptError(f"Coordinates come in pairs x, y; got the shape {rows.shape}.")
    if not np.isfinite(rows).all():
        raise PromptError(f"Coordinates must be finite numbers, not {values!r}.")
    return rows


def _bin_sizes(rows: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    width, height = image_size
    if width < 1 or height < 1:
        raise PromptError(f"A picture must be at least 1 x 1 pixels, not {width} x {height}.")
    # divided in double, rounded once: what a float32 tensor sees of a Python number
    return np.resize(np.array([width / NUM_BINS, height / NUM_BINS]), rows.shape[-1]).astype(np.float32)
