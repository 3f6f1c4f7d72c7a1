"""Boxes and phrases: the share of expressions, or of a caption's phrases, whose first box is right."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Corners: TypeAlias = Sequence[float]
"""Left, top, right, bottom in pixels."""

LEAST_IOU = 0.5
"""A box is right from this overlap on."""


def box_ious(boxes: ArrayLike, truths: ArrayLike) -> NDArray[np.float64]:
    """Return the intersection over union of boxes (N, 4) and truths (M, 4): (N, M), 0 where both have no area."""
    first = np.asarray(boxes, np.float64).reshape(-1, 1, 4)
    second = np.asarray(truths, np.float64).reshape(1, -1, 4)
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])  # (N, M, 2)
    shared = sides.clip(min=0).prod(-1)
    union = _areas(first) + _areas(second) - shared
    ious: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return ious


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return areas


def is_right(boxes: Sequence[Corners], truths: Sequence[Corners]) -> bool:
    """Return whether the first of the boxes overlaps one of the truths by `LEAST_IOU`; without any box it is wrong."""
    return bool(boxes) and bool((box_ious(boxes[:1], truths) >= LEAST_IOU).any())


def box_accuracy(answers: Sequence[Sequence[Corners]], truths: Sequence[Corners]) -> float:
    """Return the share of expressions, 0 to 1, whose first box is right.

    Args:
        answers: The boxes for each expression. The first one counts; an expression without any is wrong.
        truths: The box of each expression.
    """
    rights = [is_right(boxes, [truth]) for boxes, truth in zip(answers, truths, strict=True)]
    return sum(rights) / len(rights) if rights else 0.0


def enclosing_box(boxes: Sequence[Corners]) -> list[float]:
    """Return the smallest box around all boxes."""
    corners = np.asarray(boxes, np.float64)
    return [*corners[:, :2].min(0).tolist(), *corners[:, 2:].max(0).tolist()]


def phrase_recall(answers: Sequence[Sequence[Corners]], truths: Sequence[Sequence[Corners]], *, merged: bool) -> float:
    """Return Recall@1 of phrases, 0 to 1, as Flickr30k Entities is measured.

    Args:
        answers: The boxes for each phrase. The first one counts; a phrase without any is wrong.
        truths: The boxes of each phrase, at least one.
        merged: Compare with the box around all of a phrase's boxes, instead of with each of them.
    """
    wanted = [[enclosing_box(boxes)] if merged else boxes for boxes in truths]
    rights = [is_right(boxes, each) for boxes, each in zip(answers, wanted, strict=True)]
    return sum(rights) / len(rights) if rights else 0.0
