"""How far a result may be off because only these images were measured: bootstrap intervals."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
"""So many samples of the images are drawn, with replacement."""
LEAST_IMAGES = 10
"""Fewer images say nothing about others."""


def draw_counts(images: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Yield how often each sample has each image, (I,)."""
    random = np.random.default_rng(seed)
    for _ in range(DRAWS):
        yield np.bincount(random.integers(images, size=images), minlength=images)


def middle(results: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Return the percentiles 2.5 and 97.5 of the results of samples."""
    low, high = np.percentile(results, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(
    shares: Sequence[float], images: Sequence[Hashable], wholes: Sequence[float] | None = None, seed: int = 0
) -> tuple[float, float] | None:
    """Return the interval that holds a result with a probability of 95 %.

    Images are drawn, not examples, because the examples of one image are alike.

    Args:
        shares: The result of each example, such as 0 or 1.
        images: The image of each example.
        wholes: What each share is a part of; None stands for 1 each, so that the result is a mean.
        seed: Draws other samples.

    Returns:
        The percentiles 2.5 and 97.5 of sum(shares) / sum(wholes); None for fewer than `LEAST_IMAGES` images.
    """
    numbers = {image: number for number, image in enumerate(dict.fromkeys(images))}
    if len(numbers) < LEAST_IMAGES:
        return None
    groups = [numbers[image] for image in images]
    parts = np.bincount(groups, weights=np.asarray(shares, np.float64))
    whole = np.bincount(groups, weights=None if wholes is None else np.asarray(wholes, np.float64))
    sums = ((float(parts @ counts), float(whole @ counts)) for counts in draw_counts(len(numbers), seed))
    return middle([part / total if total else 0.0 for part, total in sums])
