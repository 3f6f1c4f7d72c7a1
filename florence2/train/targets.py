"""Turn boxes, quads and polygons in pixels into the text that Florence-2 is trained to write for them.

The location tokens come from the quantiser that also reads prompts and answers. Everything built here parses back with
`florence2.answers.answer` to the same regions, up to half a bin.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from florence2.errors import PromptError, shown
from florence2.inputs.coordinates import bins_to_tokens, pixels_to_bins

Size = tuple[int, int]


def location_tokens(coordinates: Any, image_size: Size) -> str:
    """Return the location tokens of coordinates x, y, x, y, ... in pixels: "<loc_1><loc_2>...".

    `image_size` is (width, height). Coordinates outside the image get the bin at its border, so no token after
    `<loc_999>` can appear. Raises PromptError for an odd number of coordinates or non-finite ones.
    """
    return bins_to_tokens(pixels_to_bins(list(coordinates), image_size))


def boxes_target(boxes: Iterable[tuple[str, Sequence[float]]], image_size: Size) -> str:
    """Build the answer of `<OD>` and phrase grounding from (label, (x1, y1, x2, y2)) rows: "car<loc_..>x4...".

    An empty label gives bare locations, the answer of `<REGION_PROPOSAL>`. Raises PromptError for swapped corners.
    """
    parts = []
    for label, box in boxes:
        if len(box) != 4 or not (box[0] <= box[2] and box[1] <= box[3]):
            raise PromptError(
                f"Box {tuple(box)} of {shown(label)} must be x1, y1, x2, y2 in pixels with x1 <= x2, y1 <= y2."
            )
        parts.append(_label(label) + location_tokens(box, image_size))
    return "".join(parts)


def quads_target(quads: Iterable[tuple[str, Sequence[float]]], image_size: Size) -> str:
    """Build the answer of `<OCR_WITH_REGION>` from (text, (x1, y1, ..., x4, y4)) rows, clockwise from the top left."""
    parts = []
    for text, quad in quads:
        if len(quad) != 8:
            raise PromptError(
                f"The quad of {shown(text)} has {len(quad)} numbers; it must be x1, y1, ..., x4, y4 in pixels."
            )
        parts.append(_label(text) + location_tokens(quad, image_size))
    return "".join(parts)


def polygons_target(rings: Iterable[Sequence[float]], image_size: Size, label: str = "") -> str:
    """Build the answer of the segmentation tasks from the closed outlines (x, y, ...) of one object."""
    outlines = [list(ring) for ring in rings]
    for ring in outlines:
        if len(ring) < 6 or len(ring) % 2:
            raise PromptError(f"An outline has {len(ring)} numbers; it needs x, y of at least three points.")
    return _label(label) + "<sep>".join(location_tokens(ring, image_size) for ring in outlines)


def _label(label: str) -> str:
    if "<" in label or "\n" in label:
        raise PromptError(f"The label {shown(label)} cannot be parsed back; leave out '<' and line breaks.")
    return label
