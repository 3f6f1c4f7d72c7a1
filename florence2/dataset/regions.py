"""From a row to its labelled regions: clipped to the image, without those that have no area."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from florence2.errors import OptionError

Numbers = Sequence[float]
TEXT_CLASS, OBJECT_CLASS = "text", "object"
"""The class of quads, whose labels are the text that was read, and of regions without a label."""
_NAMED_BY_INPUT = {"<OPEN_VOCABULARY_DETECTION>", "<REFERRING_EXPRESSION_SEGMENTATION>"}


class LabelledRegion(NamedTuple):
    """One object of an image.

    Attributes:
        label: Its name; of a quad, the text.
        box: Left, top, right, bottom in pixels.
        rings: Its outlines, x1, y1, x2, y2, ... each; of a box none.
        is_quad: Whether it is a quadrilateral with text.
        score: The geometric mean of the probabilities of the location tokens, or None.
        confidence: How probable it is that label and place are right, or None.
    """

    label: str
    box: tuple[float, float, float, float]
    rings: Sequence[Numbers]
    is_quad: bool
    score: float | None
    confidence: float | None


class RegionReader:
    """Reads the regions of rows, and counts what it changes or leaves out.

    Attributes:
        counts: How many regions were "clipped" to the image, had their corners "swapped", were "degenerate" (without
            area) or "below_min_confidence", and how many "degenerate_rings" outlines of several parts lost.
    """

    def __init__(self, least: float | None = None):
        """Keep the regions whose confidence is `least` or more; None keeps all."""
        self.least = least
        self.counts: Counter[str] = Counter()

    def read(self, row: Mapping[str, Any], size: tuple[int, int]) -> list[LabelledRegion]:
        """Return the regions of an answered row about an image of this width and height.

        Raises:
            OptionError: A region has no confidence to compare with the least one.
            KeyError, TypeError, ValueError, IndexError: The values are not those of a row.
        """
        regions = []
        for shape, parts in _shapes(row):
            confidence = shape.get("confidence")
            if self.least and not self._is_sure(confidence):
                self.counts["below_min_confidence"] += 1
            elif (region := self._read_shape(shape, parts, size)) is not None:
                regions.append(region)
        return regions

    def _is_sure(self, confidence: Any) -> bool:
        if confidence is None:
            raise OptionError(
                "--min-confidence needs confidences, which some regions of the folder lack; leave the option out, or "
                "answer again with confidences."
            )
        return bool(confidence >= self.least)

    def _read_shape(self, shape: Mapping[str, Any], parts: Any, size: tuple[int, int]) -> LabelledRegion | None:
        """Return the region of a shape, or None where it has no area."""
        quad = shape.get("xyxyxyxy")
        rings = self._rings(parts if quad is None else [quad], size) if parts or quad is not None else []
        box = self._box(shape["xyxy"], size) if "xyxy" in shape else _extent(rings)
        if box is None:
            self.counts["degenerate"] += 1
            return None
        label = shape["label"]
        if not isinstance(label, str):
            raise TypeError("A label must be a text.")
        score, confidence = shape.get("score"), shape.get("confidence")
        _check_numbers(score, confidence)
        return LabelledRegion(label, box, rings, quad is not None, score, confidence)

    def _box(self, xyxy: Numbers, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
        x1, y1, x2, y2 = xyxy
        if bool in map(type, xyxy):  # a bool is an int to Python
            raise TypeError("A coordinate must be a number.")
        width, height = size
        if 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height:
            return x1, y1, x2, y2
        if x1 > x2 or y1 > y2:
            self.counts["swapped"] += 1
            x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
            self.counts["clipped"] += 1
            x1, y1, x2, y2 = _clamp(x1, width), _clamp(y1, height), _clamp(x2, width), _clamp(y2, height)
        return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None  # also where a coordinate is not a number

    def _rings(self, rings: Sequence[Numbers], size: tuple[int, int]) -> list[Numbers]:
        """Return the rings that have an area, clipped to the image."""
        kept: list[Numbers] = []
        clipped = False
        for ring in rings:
            if len(ring) % 2:
                raise ValueError("A ring has an odd number of coordinates.")
            inside = [_clamp(value, size[i % 2]) for i, value in enumerate(ring)]
            clipped = clipped or inside != ring
            if shoelace(inside) > 0:
                kept.append(inside)
        self.counts["clipped"] += clipped
        self.counts["degenerate_rings"] += len(rings) - len(kept) if kept else 0
        return kept


def _shapes(row: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Yield the shapes of a row, each with the rings that belong to it."""
    if "caption" in row:
        boxes = row["grounding"].get("boxes", ())
        for box, outline in zip(boxes, row["segments"], strict=True):
            rings = [ring for polygon in outline.get("polygons", ()) for ring in polygon["rings"]]
            yield box, rings
        return
    given = default_label(row)
    for box in row.get("boxes", ()):
        yield (box if box.get("label") else {**box, "label": given}), ()
    for quad in row.get("quads", ()):
        yield quad, ()
    for polygon in row.get("polygons", ()):
        yield (polygon if polygon.get("label") else {**polygon, "label": given}), polygon["rings"]


def default_label(row: Mapping[str, Any]) -> str:
    """Return the label of regions for which the model writes none: the text that the task was given, or "object"."""
    text = row.get("input")
    return text if isinstance(text, str) and text.strip() and row.get("task") in _NAMED_BY_INPUT else OBJECT_CLASS


def _check_numbers(*values: Any) -> None:
    """Raise ValueError unless each score or confidence is a number or None: NaN would make a file that is not JSON."""
    for value in values:
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError("A score or confidence must be a number.")


def _clamp(value: float, limit: float) -> float:
    return 0.0 if value < 0 else float(limit) if value > limit else value


def shoelace(ring: Numbers) -> float:
    """Return the area inside a ring."""
    xs, ys = ring[0::2], ring[1::2]
    # from the first point, so that large coordinates do not cost digits
    x0, y0 = (xs[0], ys[0]) if xs else (0.0, 0.0)
    total, px, py = 0.0, 0.0, 0.0
    for x, y in zip(xs, ys, strict=True):
        total += px * (y - y0) - (x - x0) * py
        px, py = x - x0, y - y0
    return abs(total) / 2


def _extent(rings: Sequence[Numbers]) -> tuple[float, float, float, float] | None:
    """Return the box around rings, if there are any."""
    if not rings:
        return None
    xs = [x for ring in rings for x in ring[0::2]]
    ys = [y for ring in rings for y in ring[1::2]]
    return min(xs), min(ys), max(xs), max(ys)
