"""Masks from outlines and run lengths as COCO stores them, and how far two masks overlap."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
"""(H, W), true inside."""

_FINER = 5  # outlines are walked on a grid that is so much finer than pixels


def fill_rings(rings: Sequence[Sequence[float]], width: int, height: int) -> Mask:
    """Return the mask of everything that closed outlines enclose.

    Args:
        rings: The outlines, each x, y, x, y, ... in pixels. They are filled one by one and joined.
        width: The width of the image in pixels.
        height: Its height.

    Returns:
        The mask, equal to that of pycocotools.
    """
    mask = np.zeros((height, width), bool)
    for ring in filter(len, rings):
        mask |= _fill(ring, width, height)
    return mask


def _fill(ring: Sequence[float], width: int, height: int) -> Mask:
    """Fill one outline: along a column, each crossing of the outline turns inside to outside."""
    points = np.asarray(ring, np.float64).reshape(-1, 2)
    corners = np.trunc(_FINER * points + 0.5).astype(np.int64)
    walked = np.concatenate([_walk(*pair) for pair in zip(corners, np.roll(corners, -1, 0), strict=True)])
    before, after = walked[:-1], walked[1:]
    column = (np.minimum(after[:, 0], before[:, 0]) + 0.5) / _FINER - 0.5
    row = np.ceil(((np.minimum(after[:, 1], before[:, 1]) + 0.5) / _FINER - 0.5).clip(0, height))
    crosses = (after[:, 0] != before[:, 0]) & (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    turns = column[crosses].astype(np.int64) * height + row[crosses].astype(np.int64)
    inside = np.bincount(turns, minlength=width * height + 1)[: width * height].cumsum() % 2
    return inside.reshape(width, height).T.astype(bool)  # column by column -> (H, W)


def _walk(start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the points of a line (N, 2), one for each step along its longer side."""
    (dx, dy), long = np.abs(end - start), 0
    if dx < dy:
        long = 1
    low, high = (end, start) if start[long] > end[long] else (start, end)
    steps = np.arange(max(dx, dy) + 1)
    slope = (high[1 - long] - low[1 - long]) / steps[-1] if steps[-1] else 0.0
    points = np.empty((len(steps), 2), np.int64)
    points[:, long] = steps + low[long]
    points[:, 1 - long] = np.trunc(low[1 - long] + slope * steps + 0.5)
    return points if low is start else points[::-1]


def read_counts(counts: str | Sequence[int], width: int, height: int) -> Mask:
    """Return the mask of run lengths, which alternate between outside and inside, column by column.

    Args:
        counts: The lengths, as numbers or packed into letters as COCO does.
        width: The width of the image in pixels.
        height: Its height.

    Raises:
        ValueError: The lengths are damaged, or do not add up to the image.
    """
    runs = check_counts(counts, width, height)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return inside.reshape(width, height).T  # column by column -> (H, W)


def check_counts(counts: str | Sequence[int], width: int, height: int) -> list[int]:
    """Return run lengths as numbers. Raises ValueError where they are damaged, or do not add up to the image."""
    runs = _unpack(counts) if isinstance(counts, str) else list(counts)
    if any(run < 0 for run in runs) or sum(runs) != width * height:
        raise ValueError(f"Run lengths of a mask must add up to {width} x {height} pixels.")
    return runs


def _unpack(packed: str) -> list[int]:
    """Return run lengths from letters: five bits each, lowest first; from the fourth on differences to two before."""
    runs: list[int] = []
    value = shift = 0
    for letter in packed:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("Run lengths of a mask hold a letter that has no meaning there.")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("Run lengths of a mask end within a number.")
    return runs


class Overlap(NamedTuple):
    """The pixels that two masks share, and those of either."""

    shared: int
    either: int

    @property
    def iou(self) -> float:
        """Intersection over union; two empty masks do not overlap."""
        return self.shared / self.either if self.either else 0.0


def overlap(mask: Mask, truth: Mask) -> Overlap:
    """Return the overlap of two masks of the same size."""
    return Overlap(int((mask & truth).sum()), int((mask | truth).sum()))


def mean_iou(overlaps: Sequence[Overlap]) -> float:
    """Return the mean of the IoUs, in which each expression counts the same."""
    return sum(each.iou for each in overlaps) / len(overlaps) if overlaps else 0.0


def cumulative_iou(overlaps: Sequence[Overlap]) -> float:
    """Return all shared pixels over all pixels of either, in which large things count more."""
    return Overlap(sum(each.shared for each in overlaps), sum(each.either for each in overlaps)).iou
