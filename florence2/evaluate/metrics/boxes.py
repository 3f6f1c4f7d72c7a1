"""Boxes: how far two overlap, and whether the first box of an answer is right."""

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


def enclosing_box(boxes: Sequence[Corners]) -> list[float]:
    """Return the smallest box around all boxes."""
    corners = np.asarray(boxes, np.float64)
    return [*corners[:, :2].min(0).tolist(), *corners[:, 2:].max(0).tolist()]
