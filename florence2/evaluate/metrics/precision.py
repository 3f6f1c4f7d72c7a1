"""Average precision of ranked boxes for many samples of the images at once, as COCO counts it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_LEVELS = np.linspace(0, 1, 101)
"""The precision is read at these recalls."""


class RankedBoxes(NamedTuple):
    """The boxes of one category, the surest first, N of them in I images, and T least overlaps that are asked for.

    Attributes:
        images: The number of each box's image, (N,).
        right: Whether the box is right, (T, N).
        wrong: Whether it is wrong, (T, N); a box that neither is does not count, such as one on a crowd.
        truths: How many objects each image has, crowds left out, (I,).
    """

    images: NDArray[np.int64]
    right: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    truths: NDArray[np.int64]


def mean_precisions(categories: Sequence[RankedBoxes], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mAP of each sample, 0 for one without any object.

    Args:
        categories: The boxes of each category.
        counts: How often each sample has each image, (D, I).
    """
    totals = np.zeros(len(counts))
    present = np.zeros(len(counts))
    for boxes in categories:
        truths = counts @ boxes.truths  # (D,)
        totals += _precisions(boxes, counts, truths)
        present += truths > 0
    return np.divide(totals, present, out=np.zeros_like(totals), where=present > 0)


def _precisions(boxes: RankedBoxes, counts: NDArray[np.int64], truths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the average precision of each sample, 0 where it has no object."""
    if not len(boxes.images):
        return np.zeros(len(counts))
    weights = counts[:, boxes.images]  # (D, N)
    pairs = zip(boxes.right, boxes.wrong, strict=True)
    each = [_precision(weights * right, weights * wrong, truths) for right, wrong in pairs]
    means: NDArray[np.float64] = np.mean(each, axis=0)
    return means


def _precision(right: NDArray[np.int64], wrong: NDArray[np.int64], truths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean over the levels of the best precision from that recall on, (D,), of boxes (D, N)."""
    right, wrong = right.cumsum(1), wrong.cumsum(1)
    precision = right / np.maximum(right + wrong, 1)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(_LEVELS, right / np.maximum(truths, 1)[:, None], side="right")  # (D, N)
    reached[truths == 0] = 0
    newly = np.diff(reached, axis=1, prepend=0)
    sums: NDArray[np.float64] = (best * newly).sum(1)
    return sums / len(_LEVELS)
