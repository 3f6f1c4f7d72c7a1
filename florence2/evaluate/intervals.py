"""How far a result may be off because only these images were measured: bootstrap intervals."""

from collections.abc import Hashable, Sequence

import numpy as np

DRAWS = 1000
"""So many samples of the images are drawn, with replacement."""
LEAST_IMAGES = 10
"""Fewer images say nothing about others."""


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
    random = np.random.default_rng(seed)
    results = np.empty(DRAWS)
    for draw in range(DRAWS):
        drawn = random.integers(len(numbers), size=len(numbers))
        total = float(whole[drawn].sum())
        results[draw] = parts[drawn].sum() / total if total else 0.0
    low, high = np.percentile(results, [2.5, 97.5])
    return float(low), float(high)
