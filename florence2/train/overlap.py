"""Overlap of regions: intersection over union (IoU) of boxes and of outlines, and the matching of counterparts."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from pycocotools import mask

from florence2.answers.answer import Box
from florence2.inputs.coordinates import NUM_BINS

BoxArea: TypeAlias = list[float]
"""Left, top, width, height."""
Area: TypeAlias = "BoxArea | dict[str, Any]"
"""A box, or a mask as pycocotools encodes it. Boxes compare with boxes only, masks with masks."""

GRID = 2 * NUM_BINS
"""Outlines are compared as masks of GRID x GRID points; every centre of a location bin is one."""


def box_area(box: Box, image_size: tuple[int, int]) -> BoxArea:
    """Return left, top, width, height of a box in pixels. `image_size` is (width, height).

    A box whose corners share a bin gets the size of that bin: without an area it would not even overlap itself.
    """
    x1, y1, x2, y2 = box.xyxy
    width, height = image_size
    return [x1, y1, max(x2 - x1, width / NUM_BINS), max(y2 - y1, height / NUM_BINS)]


def outline_area(rings: Iterable[Sequence[float]], image_size: tuple[int, int]) -> Area:
    """Return the mask of everything that the closed outlines (x, y, x, y, ... in pixels) enclose.

    The image is stretched to a square, which does not change an IoU. Half a bin at each ring's first point is always
    part of the mask, so even a line overlaps itself.
    """
    scale = GRID / image_size[0], GRID / image_size[1]
    rows = []
    for ring in rings:
        points = [value * scale[i % 2] for i, value in enumerate(ring)]
        x, y = points[:2]
        rows.append([x, y, x + 1, y, x + 1, y + 1, x, y + 1])
        if len(points) >= 6:  # pycocotools would read fewer as a box
            rows.append(points)
    return dict(mask.merge(mask.frPyObjects(rows or [[0.0] * 6], GRID, GRID)))


def overlaps(truths: Sequence[Area], areas: Sequence[Area]) -> np.ndarray:
    """Return the IoU of every truth with every area: (T, A), 0..1."""
    if not truths or not areas:
        return np.zeros((len(truths), len(areas)))
    return np.asarray(mask.iou(list(truths), list(areas), [0] * len(areas)))


def match(ious: np.ndarray, least: float) -> list[tuple[int, int]]:
    """Match truths and areas one to one by their IoUs (T, A), the highest first and none below `least`."""
    pairs: list[tuple[int, int]] = []
    taken: tuple[set[int], set[int]] = (set(), set())
    for flat in np.argsort(-ious, axis=None, kind="stable").tolist():
        truth, area = divmod(flat, ious.shape[1])
        if ious[truth, area] < least:
            break
        if truth not in taken[0] and area not in taken[1]:
            taken[0].add(truth)
            taken[1].add(area)
            pairs.append((truth, area))
    return pairs
