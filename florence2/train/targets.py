"""Pixel boxes, quads and polygons -> the text that Florence-2 is trained to write for them.

The one place where training targets get their location tokens, by the same quantiser that reads prompts and answers.
Everything built here parses back by `florence2.answers.answer` to the same regions, up to half a bin.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from florence2.errors import PromptError
from florence2.inputs.coordinates import pixels_to_bins

Size = tuple[int, int]


def location_tokens(coordinates: Any, image_size: Size) -> str:
    """Numbers x, y, x, y, ... in pixels -> "<loc_1><loc_2>...".

    `image_size` is (width, height). Outside the picture the border's bin is taken, so no token beyond `<loc_999>` can
    appear. Raises PromptError for an odd number of coordinates or non-finite ones.
    """
    return "".join(f"<loc_{bin}>" for bin in pixels_to_bins(list(coordinates), image_size))


def boxes_target(boxes: Iterable[tuple[str, Sequence[float]]], image_size: Size) -> str:
    """(label, (x1, y1, x2, y2)) rows -> "car<loc_..>x4person<loc_..>x4", as `<OD>` and phrase grounding answer.

    An empty label gives bare locations, as `<REGION_PROPOSAL>` answers. Raises PromptError for swapped corners.
    """
    parts = []
    for label, box in boxes:
        if len(box) != 4 or not (box[0] <= box[2] and box[1] <= box[3]):
            raise PromptError(
                f"Box {tuple(box)} of {label!r} must be x1, y1, x2, y2 in pixels with x1 <= x2, y1 <= y2."
            )
        parts.append(_label(label) + location_tokens(box, image_size))
    return "".join(parts)


def quads_target(quads: Iterable[tuple[str, Sequence[float]]], image_size: Size) -> str:
    """(text, (x1, y1, ..., x4, y4)) rows, clockwise from the top left -> what `<OCR_WITH_REGION>` answers."""
    parts = []
    for text, quad in quads:
        if len(quad) != 8:
            raise PromptError(
                f"The quad of {text!r} has {len(quad)} numbers; it must be x1, y1, ..., x4, y4 in pixels."
            )
        parts.append(_label(text) + location_tokens(quad, image_size))
    return "".join(parts)


def polygons_target(rings: Iterable[Sequence[float]], image_size: Size, label: str = "") -> str:
    """Closed outlines (x, y, x, y, ...) of one object -> what the segmentation tasks answer, `<sep>` between them."""
    outlines = [list(ring) for ring in rings]
    for ring in outlines:
        if len(ring) < 6 or len(ring) % 2:
            raise PromptError(f"An outline needs x, y of at least three points, not {len(ring)} numbers.")
    return _label(label) + "<sep>".join(location_tokens(ring, image_size) for ring in outlines)


def _label(label: str) -> str:
    if "<" in label or "\n" in label:
        raise PromptError(f"The label {label!r} cannot be read back: leave out '<' and line breaks.")
    return label
