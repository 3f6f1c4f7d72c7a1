"""Refuse 16-bit values that are likely of fewer bits, which would make an image almost black (in CMYK, almost white).

A few pixels may be bright in any image: a sensor's hot pixels, a time stamp. The brightest thousandth does not count.
"""

import math
from collections.abc import Iterable

import numpy as np
from PIL import Image

from florence2.errors import ImageError

DEEPEST = 65535
_DIMMEST = 4096  # values of 12 bits and fewer, which would be almost black
_COUNTED = 0.999  # share of the values, from the smallest, that must reach it
_COLOURS = {"LA": 1, "RGB": 3, "RGBA": 3, "RGBX": 3, "CMYK": 4}
DEEP_COLOUR = tuple(_COLOURS)
"""Modes that may hold 8 bits a channel of what were 16."""


def check_depth(blocks: Iterable[np.ndarray], name: str) -> None:
    """Raise ImageError where values 0..65535, given in blocks, are dim; an image of zeros is black in any depth."""
    counts = np.zeros(DEEPEST + 1, np.int64)
    for block in blocks:
        counts += np.bincount(block.ravel(), minlength=DEEPEST + 1)
    counts[0] = 0  # a night sky is dark in most places, and its stars count
    highest = _reached(counts)
    if 0 < highest < _DIMMEST:
        raise ImageError(_too_dim(name, counts, f"at most {highest:,}", "black"))


def check_deep_colour(image: Image.Image, name: str) -> None:
    """Raise ImageError for an image of 16 bits a channel, which Pillow reads as 8, that became almost black."""
    bands = np.array(image.histogram()).reshape(-1, 256)
    counts = bands[: _COLOURS[image.mode]].sum(0)
    highest = _reached(counts)
    if highest < _DIMMEST >> 8:
        reach, colour = f"less than {(highest + 1) << 8:,}", "white" if image.mode == "CMYK" else "black"
        raise ImageError(_too_dim(name, counts, reach, colour))


def _reached(counts: np.ndarray) -> int:
    """Return the value that `_COUNTED` of the counted values do not exceed; 0 where none is counted."""
    sums = counts.cumsum()
    return int(np.searchsorted(sums, math.ceil(sums[-1] * _COUNTED)))


def _too_dim(name: str, counts: np.ndarray, reach: str, colour: str) -> str:
    almost = "" if counts.nonzero()[0].max(initial=0) <= _reached(counts) else ", but for the brightest 0.1 %"
    return (
        f"{name} has 16-bit values of {reach}{almost}, so it would be almost {colour}: 16 bits reach {DEEPEST:,}. If "
        "the values are of fewer bits, scale them to 0..255 and give 8 bits (uint8)."
    )
