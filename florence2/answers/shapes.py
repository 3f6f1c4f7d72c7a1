"""The shapes of an answer: boxes, quads and polygons in pixels, each with its label, score and confidence."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A labelled box.

    Attributes:
        xyxy: Left, top, right, bottom in pixels of the original image, in the order the model wrote them.
        label: The object's name or description; empty for a proposal.
        score: The geometric mean of the probabilities of the location tokens, 0..1: the reference's number, low even
            for right boxes. None when the answer was parsed without log-probabilities.
        confidence: How probable it is that label and place are right, 0..1 (see `florence2.answers.confidence`). None
            when it was not asked for.
    """

    xyxy: tuple[float, float, float, float]
    label: str = ""
    score: float | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Quad:
    """A labelled quadrilateral, such as a line of text.

    Attributes:
        xyxyxyxy: Four corners x1, y1, ..., x4, y4 in pixels of the original image, clockwise from the top left.
        label: The text that was read there.
        score: As for `Box`.
        confidence: As for `Box`.
    """

    xyxyxyxy: tuple[float, ...]
    label: str = ""
    score: float | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Polygon:
    """A labelled object with one or more closed outlines.

    Attributes:
        rings: The outlines, each x1, y1, x2, y2, ... in pixels of the original image.
        label: The object's name or description; empty where the task writes none.
        score: As for `Box`.
        confidence: As for `Box`.
    """

    rings: tuple[tuple[float, ...], ...]
    label: str = ""
    score: float | None = None
    confidence: float | None = None


def pairs(row: Sequence[float]) -> list[tuple[float, float]]:
    """Return the points of a row x1, y1, x2, y2, ..."""
    return list(zip(row[0::2], row[1::2], strict=True))


def corners(xyxy: tuple[float, float, float, float]) -> list[tuple[float, float]]:
    """Return the four corners of a box, clockwise."""
    x1, y1, x2, y2 = xyxy
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
