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
"""Left, top, right, bottom in pixels."""


def coverage(box: Corners, image_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """How much of each cell of a grid (h, w) over the picture lies in `box`: (h, w), 0..1.

    `image_size` is (width, height) in pixels. Raises OptionError for a box without area in the picture.
    """
    (left, top, right, bottom), (width, height) = box, image_size
    down = _overlap(top / height, bottom / height, grid[0])
    across = _overlap(left / width, right / width, grid[1])
    found = down[:, None] * across[None, :]
    if not found.any():
        raise OptionError(f"The box {tuple(box)} has no area in the picture of {width} x {height} pixels.")
    return found


def cells_in(box: Corners, image_size: tuple[int, int], grid: tuple[int, int], least: float = 0.5) -> list[int]:
    """The cells of a grid, counted row by row, of which at least `least` lies in `box`; never none.

    A box that fills no cell so far has the cell of which it fills most.
    """
    filled = coverage(box, image_size, grid).flatten()
    chosen: list[int] = (filled >= least).nonzero()[:, 0].tolist()
    return chosen or [int(filled.argmax())]


def image_cells(f: Florence2) -> tuple[tuple[int, int], slice]:
    """The grid (h, w) of the image tokens at the checkpoint's own picture size, and where in the memory its cells are.

    They are the same places among the image tokens, row by row; what else there is, is the mean of all.
    """
    vision, settings = f.model.config.vision, f.processor.image_config
    grid = vision.grid_size(settings.height, settings.width)
    spans = pooled_spans(vision, grid)
    return grid, next(spans[source] for source in spans if source != "spatial_avg_pool")


def box_iou(a: Corners, b: Corners, image_size: tuple[int, int]) -> float:
    """Intersection over union, 0..1. A box whose corners share a location bin is given that bin's size."""
    (al, at, ar, ab), (bl, bt, br, bb) = (_with_area(box, image_size) for box in (a, b))
    inside = max(0.0, min(ar, br) - max(al, bl)) * max(0.0, min(ab, bb) - max(at, bt))
    return inside / ((ar - al) * (ab - at) + (br - bl) * (bb - bt) - inside)


def mean_iou(expected: Sequence[Corners], found: Sequence[Box], image_size: tuple[int, int]) -> float:
    """The mean over `expected` of the best overlap with any box found, whatever its label; 0 where there is none."""
    best = [max((box_iou(box, other.xyxy, image_size) for other in found), default=0.0) for box in expected]
    return sum(best) / len(best)


def _overlap(start: float, stop: float, count: int) -> Tensor:
    """How much of each of `count` equal parts of 0..1 lies between `start` and `stop`."""
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
