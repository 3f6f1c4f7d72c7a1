"""Boxes of pixels against the grid of image tokens, and against each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from florence2.answers.answer import Box
from florence2.errors import OptionError
from florence2.inputs.coordinates import NUM_BINS
from florence2.pipeline import Florence2
from florence2.tracing.names import pooled_spans

Corners = Sequence[float]
"""(left, top, right, bottom) in pixels."""


def coverage(box: Corners, image_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return the share of each cell of a grid that lies in a box.

    Args:
        box: (left, top, right, bottom) in pixels.
        image_size: (width, height) in pixels.
        grid: (rows, columns) of equal cells over the image.

    Returns:
        (rows, columns), float64 in 0..1.

    Raises:
        OptionError: The box has no area in the image.
    """
    (left, top, right, bottom), (width, height) = box, image_size
    down = _overlap(top / height, bottom / height, grid[0])
    across = _overlap(left / width, right / width, grid[1])
    shares = down[:, None] * across[None, :]
    if not shares.any():
        raise OptionError(f"The box {tuple(box)} has no area in the image of {width} x {height} pixels.")
    return shares


def cells_in(box: Corners, image_size: tuple[int, int], grid: tuple[int, int], least: float = 0.5) -> list[int]:
    """Return the cells of a grid that lie in a box, at least one.

    Args:
        box: (left, top, right, bottom) in pixels.
        image_size: (width, height) in pixels.
        grid: (rows, columns) of equal cells over the image.
        least: The share of a cell, 0..1, that must lie in the box.

    Returns:
        The cells, counted row by row; when no cell reaches `least`, the one with the largest share.

    Raises:
        OptionError: The box has no area in the image.
    """
    filled = coverage(box, image_size, grid).flatten()
    chosen: list[int] = (filled >= least).nonzero()[:, 0].tolist()
    return chosen or [int(filled.argmax())]


def image_cells(f: Florence2) -> tuple[tuple[int, int], slice]:
    """Return the grid of the image tokens at the checkpoint's own image size, and where its cells are.

    Args:
        f: The model.

    Returns:
        (rows, columns), and the span of the cells, row by row, both in the memory and among the image tokens. Tokens
        outside of it are means over the grid.
    """
    vision, settings = f.model.config.vision, f.processor.image_config
    grid = vision.grid_size(settings.height, settings.width)
    spans = pooled_spans(vision, grid)
    return grid, next(spans[source] for source in spans if source != "spatial_avg_pool")


def box_iou(a: Corners, b: Corners, image_size: tuple[int, int]) -> float:
    """Return the intersection over union of two boxes, 0..1; corners in one location bin span that bin."""
    (al, at, ar, ab), (bl, bt, br, bb) = (_with_area(box, image_size) for box in (a, b))
    inside = max(0.0, min(ar, br) - max(al, bl)) * max(0.0, min(ab, bb) - max(at, bt))
    return inside / ((ar - al) * (ab - at) + (br - bl) * (bb - bt) - inside)


def mean_iou(expected: Sequence[Corners], found: Sequence[Box], image_size: tuple[int, int]) -> float:
    """Return the mean over `expected` of the best overlap with any box found, of any label; 0 without boxes."""
    best = [max((box_iou(box, other.xyxy, image_size) for other in found), default=0.0) for box in expected]
    return sum(best) / len(best)


def _overlap(start: float, stop: float, count: int) -> Tensor:
    """Return the share of each of `count` equal parts of 0..1 that lies between `start` and `stop`."""
    edges = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    return ((edges[1:].clamp(max=stop) - edges[:-1].clamp(min=start)) * count).clamp(0, 1)


def _with_area(box: Corners, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    return (
        left,
        top,
        left + max(right - left, image_size[0] / NUM_BINS),
        top + max(bottom - top, image_size[1] / NUM_BINS),
    )
