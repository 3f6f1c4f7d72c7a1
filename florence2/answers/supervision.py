"""Hand an answer's regions to the supervision library, as its `Detections`."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from florence2.answers.shapes import Box, Polygon, Quad, corners, pairs
from florence2.errors import OptionError, shown

UNKNOWN = -1
"""The class id of a label that is not among the classes."""


def to_detections(
    shapes: Sequence[Box | Quad | Polygon], image_size: tuple[int, int], classes: Sequence[str] | None = None
) -> Any:
    """Return `supervision.Detections` of shapes of one kind; see `Answer.to_supervision`."""
    try:
        supervision = importlib.import_module("supervision")
    except ModuleNotFoundError as error:
        raise OptionError(
            f"to_supervision needs the package {error.name}, which is not installed: pip install supervision"
        ) from None
    known = _check_classes(shapes, classes)
    if not shapes:
        return supervision.Detections.empty()
    confidences = [shape.confidence for shape in shapes]
    outlined = any(isinstance(shape, Polygon) for shape in shapes)
    data: dict[str, Any] = {"class_name": np.array([shape.label for shape in shapes])}
    if all(isinstance(shape, Quad) for shape in shapes):
        data["xyxyxyxy"] = np.array([_points(shape) for shape in shapes], np.float32)  # (N, 4, 2)
    return supervision.Detections(
        xyxy=np.array([_bounds(shape) for shape in shapes], np.float32),
        mask=np.stack([_mask(shape, image_size) for shape in shapes]) if outlined else None,
        confidence=None if None in confidences else np.array(confidences, np.float32),
        class_id=np.array([known.get(shape.label, UNKNOWN) for shape in shapes]),
        data=data,
    )


def _check_classes(shapes: Sequence[Box | Quad | Polygon], classes: Sequence[str] | None) -> dict[str, int]:
    """Return the id of each class: its place in `classes`, or among the sorted labels."""
    if isinstance(classes, str) or not isinstance(classes, Sequence | None):
        raise OptionError(f"classes is {shown(classes)}; give a list of labels, such as ['car', 'dog'].")
    names = sorted({shape.label for shape in shapes}) if classes is None else classes
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _points(shape: Box | Quad | Polygon) -> list[tuple[float, float]]:
    if isinstance(shape, Box):
        return corners(shape.xyxy)
    rings = [shape.xyxyxyxy] if isinstance(shape, Quad) else shape.rings
    return [point for ring in rings for point in pairs(ring)]


def _bounds(shape: Box | Quad | Polygon) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom, in that order whatever the model wrote."""
    xs, ys = zip(*(_points(shape) or [(0.0, 0.0)]), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _mask(shape: Box | Quad | Polygon, image_size: tuple[int, int]) -> np.ndarray:
    """Return the inside of a shape, bool (height, width)."""
    mask = Image.new("1", (int(image_size[0]), int(image_size[1])))
    for ring in [pairs(ring) for ring in shape.rings] if isinstance(shape, Polygon) else [_points(shape)]:
        if len(ring) > 1:
            ImageDraw.Draw(mask).polygon(ring, fill=1)
    return np.asarray(mask, bool)
