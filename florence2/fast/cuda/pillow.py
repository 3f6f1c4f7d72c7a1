"""How the installed Pillow resizes: its coefficients for each direction, and which direction it takes first.

Nothing of its filters is written down here. Pillow is asked, so that the numbers are those of its version and of the
machine it was compiled for, and every filter that it has is known.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

BITS = 22
"""Fraction bits of a coefficient: Pillow sums integer products of 8-bit values, and clips to 8 bits after each pass."""
_WIDEST = 5  # source pixels, at scale 1, from the centre of any filter to its end; of the widest, MKS2021, 4.5

Size = tuple[int, int]
"""Width and height."""
Order = Callable[[Size, Size], bool]
"""Whether an image of one size that gets another is resized vertically first."""


def coefficients(length: int, target: int, resample: int) -> np.ndarray:
    """Return which source pixels each target pixel is made of, and with which weights.

    Args:
        length: The number of pixels of the source in this direction.
        target: The number of pixels that it becomes; not `length`, which Pillow does not resize.
        resample: Pillow's number of the filter.

    Returns:
        int32 (2, K, target): indices 0..length - 1, and weights in units of 2^-22.
    """
    # A row of zeros and ones of 2^22, resized in 32 bits, shows each one's weight, rounded as Pillow rounds it for 8
    # bits. The ones of a row are so far apart that a target pixel sees at most one; rows together have all places.
    scale = length / target
    period = min(length, 2 * math.ceil(_WIDEST * max(scale, 1)) + 3)
    ones = np.zeros((period, length), np.int32)
    ones[np.arange(length) % period, np.arange(length)] = 1 << BITS
    seen = np.asarray(Image.fromarray(ones).resize((target, period), Image.Resampling(resample)))  # (period, target)
    lowest = np.floor((np.arange(target) + 0.5) * scale - period / 2).astype(np.int64).clip(0, length - period)
    places = lowest + np.arange(period)[:, None]
    weights = np.take_along_axis(seen, places % period, axis=0)
    assert (abs(weights.sum(axis=0, dtype=np.int64) - (1 << BITS)) <= period).all()  # each is within 0.5 of its double
    return _without_zeros(places, weights, length)


def _without_zeros(places: np.ndarray, weights: np.ndarray, length: int) -> np.ndarray:
    """Return (2, K, target) with the smallest K that holds all weights other than 0."""
    first = (weights != 0).argmax(axis=0)
    last = len(weights) - 1 - (weights[::-1] != 0).argmax(axis=0)
    count = int((last - first).max()) + 1
    kept = first.clip(max=len(weights) - count) + np.arange(count)[:, None]
    result = np.stack([np.take_along_axis(values, kept, axis=0) for values in (places, weights)])
    assert result[0].min() >= 0 and result[0].max() < length
    return result.astype(np.int32)


@cache
def pass_order() -> Order | None:
    """Return the rule by which the installed Pillow chooses the first direction; None if it is not a known one."""
    seen = [(sizes, _vertical_first(*sizes)) for sizes in _PROBES]
    return next((rule for rule in _ORDERS if all(first in (rule(*sizes), None) for sizes, first in seen)), None)


def _vertical_first(old: Size, new: Size) -> bool | None:
    """Return whether Pillow resizes these sizes vertically first; None where the order makes no difference."""
    noise = np.random.default_rng(0).integers(0, 2, (old[1], old[0], 3), np.uint8) * np.uint8(255)
    image, bicubic = Image.fromarray(noise), Image.Resampling.BICUBIC
    horizontal = image.resize((new[0], old[1]), bicubic).resize(new, bicubic).tobytes()
    vertical = image.resize((old[0], new[1]), bicubic).resize(new, bicubic).tobytes()
    return None if horizontal == vertical else image.resize(new, bicubic).tobytes() == vertical


def _of_pillow_13(old: Size, new: Size) -> bool:
    return new[1] < old[1] and old[1] - new[1] > 2 * (old[0] - new[0])


def _of_pillow_12_2(old: Size, new: Size) -> bool:
    return new[1] < old[1] and old[1] > 100 * old[0]


def _of_pillow_10(_old: Size, _new: Size) -> bool:
    return False


_ORDERS: tuple[Order, ...] = (_of_pillow_13, _of_pillow_12_2, _of_pillow_10)
_PROBES: tuple[tuple[Size, Size], ...] = (
    *(((10, 10), (width, 5)) for width in (7, 8)),
    *(((20, 40), (width, 10)) for width in (4, 5, 6, 30)),
    *(((20, 16), (width, height)) for width in (19, 24) for height in (15, 18)),
    *(((3, height), (width, 20)) for height in (300, 301) for width in (2, 5)),
    ((2, 201), (3, 210)),
)
"""Old and new sizes that the rules tell apart."""
