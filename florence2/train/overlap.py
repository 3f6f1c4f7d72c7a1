"""How much regions overlap: intersection over union (IoU) of boxes and of outlines, and who is whose counterpart."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from pycocotools import mask

from florence2.answers.answer import Box
from florence2.inputs.coordinates import NUM_BINS

BoxShape: TypeAlias = list[float]
"""Left, top, width, height."""
Shape: TypeAlias = "BoxShape | dict[str, Any]"
"""A box, or a mask as pycocotools encodes it. Only like compares with like."""

GRID = 2 * NUM_BINS
"""Outlines are compared as masks of GRID x GRID, on which every location bin's centre is a point."""


def box_shape(box: Box, image_size: tuple[int, int]) -> BoxShape:
    """A box -> left, top, width, height in pixels. `image_size` is (width, height).

    One whose corners share a bin is given that bin's size: without area it would not even overlap itself.
    """
    x1, y1, x2, y2 = box.xyxy
    width, height = image_size
    return [x1, y1, max(x2 - x1, width / NUM_BINS), max(y2 - y1, height / NUM_BINS)]


def outline_shape(rings: Iterable[Sequence[float]], image_size: tuple[int, int]) -> Shape:
    """Closed outlines (x, y, x, y, ... in pixels) -> the mask of what any of them encloses.

    Stretching the picture to a square changes no IoU. Half a bin at each ring's first point is always part of the
    mask, so that even a line overlaps itself.
    """
    scale = GRID / image_size[0], GRID / image_size[1]
    rows = []
    for ring in rings:
        points = [value * scale[i % 2] for i, value in enumerate(ring)]
        x, y = points[:2]
        rows.append([x, y, x + 1, y, x + 1, y + 1, x, y + 1])
        if len(points) >= 6:  # pycocotools would take fewer for a box
            rows.append(points)
    return dict(mask.merge(mask.frPyObjects(rows or [[0.0] * 6], GRID, GRID)))


def overlaps(truths: Sequence[Shape], found: Sequence[Shape]) -> np.ndarray:
    """The IoU of every truth with everything found: (T, F), 0..1."""
    if not truths or not found:
        return np.zeros((len(truths), len(found)))
    return np.asarray(mask.iou(list(truths), list(found), [0] * len(found)))


def match(ious: np.ndarray, least: float) -> list[tuple[int, int]]:
    """One-to-one pairs (truth, found) from their IoUs (T, F), the highest first, none below `least`."""
    pairs: list[tuple[int, int]] = []
    taken: tuple[set[int], set[int]] = (set(), set())
    for flat in np.argsort(-ious, axis=None, kind="stable").tolist():
        truth, found = divmod(flat, ious.shape[1])
        if ious[truth, found] < least:
            break
        if truth not in taken[0] and found not in taken[1]:
            taken[0].add(truth)
            taken[1].add(found)
            pairs.append((truth, found))
    return pairs
