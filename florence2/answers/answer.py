"""Read a generated text as an Answer: boxes, quads, polygons, labels and scores."""

import json
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from florence2.answers.confidence import (
    NO_CALIBRATION,
    Calibration,
    Likelihoods,
    check_least,
    is_sure,
    rate_regions,
    rate_text,
    score_regions,
    score_text,
)
from florence2.answers.drawing import Shape, draw_shapes
from florence2.answers.notebook import ImageReference, Row, rows_to_html, rows_to_lines, text_to_html, to_png
from florence2.answers.notebook import image_reference as image_reference
from florence2.answers.parsing import Region, clean_label, find_regions, remove_markers
from florence2.answers.reference import reference_answer, reference_scores
from florence2.answers.shapes import Box as Box
from florence2.answers.shapes import Polygon as Polygon
from florence2.answers.shapes import Quad as Quad
from florence2.answers.shapes import corners, pairs
from florence2.answers.supervision import to_detections
from florence2.errors import ImageError, shown
from florence2.inputs.coordinates import bins_to_pixels
from florence2.inputs.image import ImageInput, open_image
from florence2.inputs.tasks import AnswerKind

CUT_OFF = "cut off at the token limit"
"""How an answer is marked, wherever it is shown, whose `finish_reason` is "length"."""


@dataclass(frozen=True, repr=False)
class Answer:
    """The model's answer to one task on one image.

    Attributes:
        task: The task's token, such as "<OD>", or the prompt itself when it has no task token.
        kind: How the text is read; see `Task.answer`.
        text: The generated text without `<s>`, `</s>` and `<pad>`. It keeps location tokens.
        raw_text: The generated text with all tokens.
        image_size: (width, height) of the original image in pixels.
        boxes: The boxes, in the order the model wrote them.
        quads: The quadrilaterals, in that order.
        polygons: The outlined objects, in that order.
        score: The geometric mean of the probabilities of the tokens of `text`, 0..1; None without log-probabilities.
        confidence: Of a text, how probable it is that all of it is right, 0..1; None where the regions have confidences
            of their own, and where it was not asked for.
        calibrated: Whether the confidences were calibrated on labelled images; False where they are raw, None where
            they were not asked for.
        sequence_score: The hypothesis's score in beam search; None without beams.
        finish_reason: "stop", or "length" for an answer that was cut off; None for an answer parsed from text.
        token_ids: The generated ids, the decoder's start id first; empty for an answer parsed from text.
        token_logprobs: One natural log-probability for each id after the first, or empty.
        token_texts: The text of each id, where log-probabilities are given.
        min_confidence: The least confidence of the regions that `with_confidence` has kept; None where it kept all.
        left_out: How many regions it left out; None as for `min_confidence`.
        alternatives: The other hypotheses, best first, when several sequences were requested.
        image: A path or weak reference to the image, for display in notebooks (see `image_reference`). Pickles and
            copies have the path only.
    """

    task: str
    kind: AnswerKind
    text: str
    raw_text: str
    image_size: tuple[int, int]
    boxes: tuple[Box, ...] = ()
    quads: tuple[Quad, ...] = ()
    polygons: tuple[Polygon, ...] = ()
    score: float | None = None
    confidence: float | None = None
    calibrated: bool | None = None
    sequence_score: float | None = None
    finish_reason: str | None = None
    token_ids: tuple[int, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    token_texts: tuple[str, ...] = ()
    min_confidence: float | None = None
    left_out: int | None = None
    alternatives: tuple["Answer", ...] = ()
    image: ImageReference = field(default=None, compare=False)

    @property
    def is_cut_off(self) -> bool:
        """Whether the token limit ended the answer, so that its end is missing."""
        return self.finish_reason == "length"

    def __str__(self) -> str:
        """Return the text, or one line for each box, quad and outline, after a line that names their columns.

        A last line says if the answer was cut off.
        """
        if self.kind == "text":
            lines = [self.text.strip()]
        else:
            rows = self._rows()
            lines = rows_to_lines(rows, self._number) if rows else self._nothing()
        if self.is_cut_off:
            lines.append(f"({CUT_OFF})")
        return "\n".join(line for line in lines if line)

    def _nothing(self) -> list[str]:
        """Return the line in place of regions where there are none."""
        if self.left_out:
            return [f"(nothing at or above {self.min_confidence:g}; {self.left_out} left out)"]
        return [] if self.is_cut_off else ["(nothing found)"]

    def __repr__(self) -> str:
        """Return one short line, without coordinates, ids and log-probabilities."""
        counts = [_count(name, len(getattr(self, name))) for name in _FIELDS[self.kind]]
        content = ", ".join(counts) or shown(self.text.strip())
        width, height = self.image_size
        cut = f", {CUT_OFF}" if self.is_cut_off else ""
        return f"Answer({shown(self.task)}, {self.kind}: {content}{cut}, image {width} x {height})"

    def to_dict(self, tokens: bool = False) -> dict[str, Any]:
        """Return the answer as plain JSON values.

        Args:
            tokens: Include ids, log-probabilities and token texts.

        Returns:
            The fields that have a value, without `image`. The lists that belong to the answer's kind are included
            even when they are empty.
        """
        hidden = () if tokens else ("token_ids", "token_logprobs", "token_texts")
        values = asdict(replace(self, alternatives=(), image=None))
        values["alternatives"] = [alternative.to_dict(tokens) for alternative in self.alternatives]
        kept = {
            key: value
            for key, value in values.items()
            if key not in hidden and (value not in (None, (), []) or key in _FIELDS[self.kind])
        }
        plain: dict[str, Any] = json.loads(json.dumps(kept))  # tuples become lists
        return plain

    def to_json(self, tokens: bool = False) -> str:
        """Return `to_dict(tokens)` as one line of JSON. Non-ASCII letters are kept."""
        return json.dumps(self.to_dict(tokens), ensure_ascii=False)

    def to_florence(self) -> dict[str, Any]:
        """Return the dict that the reference's `post_process_generation` returns for this text.

        Returns:
            {task: answer}, quirks included (see `florence2.answers.reference`). Answers of kind "boxes" with
            log-probabilities have "scores".
        """
        answer = reference_answer(self.kind, self.raw_text, self.image_size)
        if self.kind == "boxes" and self.token_logprobs and answer["bboxes"]:
            answer["scores"] = reference_scores(self.token_texts, self.token_logprobs)
        return {self.task: answer}

    def to_supervision(self, classes: Sequence[str] | None = None) -> Any:
        """Return the regions as `supervision.Detections`; the package supervision must be installed.

        Args:
            classes: The labels by their class ids; others get -1. None numbers the answer's own labels, sorted.

        Returns:
            Detections with confidence, class_id and data["class_name"]; quads with data["xyxyxyxy"], outlines with
            masks. Boxes have left, top, right, bottom in this order.

        Raises:
            OptionError: supervision is not installed, or `classes` is not a list of labels.
        """
        return to_detections([*self.boxes, *self.quads, *self.polygons], self.image_size, classes)

    def with_confidence(self, least: float) -> "Answer":
        """Return the answer with only the regions whose confidence is `least` or more; its texts stay the same.

        Args:
            least: A confidence, 0..1; 0 keeps every region.

        Returns:
            The same answer, and alternatives, with fewer boxes, quads and polygons; `left_out` counts the rest.

        Raises:
            OptionError: `least` is not a number from 0 to 1, or a region has no confidence, as with confidence=False.
        """
        least = check_least(least)
        if least == 0:
            return self

        def kept(shapes: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(shape for shape in shapes if is_sure(shape, least))

        boxes, quads, polygons = kept(self.boxes), kept(self.quads), kept(self.polygons)
        before = len(self.boxes) + len(self.quads) + len(self.polygons)
        return replace(
            self,
            boxes=boxes,
            quads=quads,
            polygons=polygons,
            alternatives=tuple(alternative.with_confidence(least) for alternative in self.alternatives),
            min_confidence=max(least, self.min_confidence or 0.0),
            left_out=(self.left_out or 0) + before - len(boxes) - len(quads) - len(polygons),
        )

    def draw(self, image: ImageInput) -> Image.Image:
        """Draw boxes, quads and filled polygons with labels and confidences; one that was cut off says so in a corner.

        Args:
            image: The image that the answer describes, in any form that `open_image` reads.

        Returns:
            A new RGB image of the same size.

        Raises:
            ImageError: The image cannot be read.
        """
        shapes = [Shape(corners(box.xyxy), box.label, box.confidence) for box in self.boxes]
        shapes += [Shape(pairs(quad.xyxyxyxy), quad.label, quad.confidence) for quad in self.quads]
        for polygon in self.polygons:
            for i, ring in enumerate(polygon.rings):  # one title per object, and none where a box has it
                titled = i == 0 and not self.boxes
                shapes.append(Shape(pairs(ring), polygon.label, polygon.confidence, filled=True, titled=titled))
        return draw_shapes(open_image(image), shapes, note=CUT_OFF if self.is_cut_off else None)

    def _repr_png_(self) -> bytes | None:
        """Return the drawing for a notebook, or None where `_repr_html_` shows the answer."""
        image = self._open_image()
        return None if image is None else to_png(self.draw(image))

    def _repr_html_(self) -> str | None:
        """Return the text or a table for a notebook; None where there is a drawing, because notebooks prefer HTML."""
        if self._open_image() is not None:
            return None
        rows = self._rows()
        note = CUT_OFF if self.is_cut_off else None
        return rows_to_html(rows, note, self._number) if rows else text_to_html(str(self))

    def _open_image(self) -> Image.Image | None:
        """Return the image to draw on, or None when it is unknown, vanished or changed, or nothing can be drawn."""
        source = self.image() if isinstance(self.image, weakref.ref) else self.image
        if source is None or not self._rows():
            return None
        try:
            image = open_image(source)
        except ImageError:
            return None
        return image if image.size == self.image_size else None

    def _rows(self) -> list[Row]:
        def number(shape: Box | Quad | Polygon) -> float | None:
            return shape.score if self.calibrated is None else shape.confidence

        rows: list[Row] = [(box.label, number(box), box.xyxy) for box in self.boxes]
        rows += [(quad.label, number(quad), quad.xyxyxyxy) for quad in self.quads]
        rows += [(polygon.label, number(polygon), ring) for polygon in self.polygons for ring in polygon.rings]
        return rows

    @property
    def _number(self) -> str:
        """The name of the numbers in `_rows`."""
        return "score" if self.calibrated is None else "confidence" if self.calibrated else "raw confidence"

    def __getstate__(self) -> dict[str, Any]:
        kept = self.image if isinstance(self.image, Path) else None  # a weak reference cannot be pickled
        return {**self.__dict__, "image": kept}


_FIELDS: dict[AnswerKind, tuple[str, ...]] = {
    "text": (),
    "boxes": ("boxes",),
    "proposals": ("boxes",),
    "phrases": ("boxes",),
    "quads": ("quads",),
    "polygons": ("polygons",),
    "boxes_or_polygons": ("boxes", "polygons"),
}
"""The fields that an answer of each kind fills."""


def parse_answer(
    task: str,
    kind: AnswerKind,
    raw_text: str,
    image_size: tuple[int, int],
    *,
    token_ids: Sequence[int] = (),
    token_logprobs: Sequence[float] = (),
    token_texts: Sequence[str] = (),
    sequence_score: float | None = None,
    finish_reason: str | None = None,
    likelihoods: Likelihoods | None = None,
    calibration: Calibration = NO_CALIBRATION,
    image: ImageReference = None,
) -> Answer:
    """Read a generated text as an answer of the given kind.

    Args:
        task: The task's token, or the prompt itself.
        kind: How to read the text.
        raw_text: The generated text with all tokens.
        image_size: (width, height) of the original image in pixels.
        token_ids: The generated ids, the decoder's start id first.
        token_logprobs: One log-probability for each id after the first. Scores need it and `token_texts`.
        token_texts: The text of each id.
        sequence_score: The hypothesis's score in beam search.
        finish_reason: "stop" or "length".
        likelihoods: The model's own probabilities along the answer. Confidences need them and `token_texts`.
        calibration: Turns raw confidences into frequencies.
        image: Where to find the image again; see `image_reference`.

    Returns:
        The answer. A text without any region in the expected form gives an answer without regions.
    """
    regions = find_regions(kind, raw_text)
    scores: list[float | None] = [None] * len(regions)
    if token_logprobs:
        scores = score_regions(kind, token_texts, token_logprobs)
    confidences: list[float | None] = [None] * len(regions)
    text_confidence = None
    if likelihoods is not None:
        parts = rate_regions(kind, token_texts, likelihoods)
        confidences = [calibration(part.raw, task, kind) for part in parts]
        if kind == "text":
            raw = rate_text(token_texts, likelihoods)
            text_confidence = 0.0 if raw is None else calibration(raw, task, kind)  # what is missing cannot be right
    rated = zip(regions, scores, confidences, strict=True)
    shapes = [_to_shape(region, image_size, score, confidence) for region, score, confidence in rated]
    return Answer(
        task=task,
        kind=kind,
        text=remove_markers(raw_text).text,
        raw_text=raw_text,
        image_size=image_size,
        boxes=tuple(shape for shape in shapes if isinstance(shape, Box)),
        quads=tuple(shape for shape in shapes if isinstance(shape, Quad)),
        polygons=tuple(shape for shape in shapes if isinstance(shape, Polygon)),
        score=score_text(token_texts, token_logprobs),
        confidence=text_confidence,
        calibrated=None if likelihoods is None else calibration.knows(task, kind),
        sequence_score=sequence_score,
        finish_reason=finish_reason,
        token_ids=tuple(token_ids),
        token_logprobs=tuple(token_logprobs),
        token_texts=tuple(token_texts),
        image=image,
    )


def _to_shape(
    region: Region, image_size: tuple[int, int], score: float | None, confidence: float | None
) -> Box | Quad | Polygon:
    label = clean_label(region.label)
    rows = [tuple(bins_to_pixels(bins, image_size)) for bins in region.bins]
    if region.shape == "polygon":
        return Polygon(tuple(row for row in rows if row), label, score, confidence)
    if region.shape == "quad":
        return Quad(rows[0], label, score, confidence)
    x1, y1, x2, y2 = rows[0]
    return Box((x1, y1, x2, y2), label, score, confidence)


def _count(field_name: str, number: int) -> str:
    singular = {"boxes": "box", "quads": "quad", "polygons": "polygon"}[field_name]
    return f"{number} {singular if number == 1 else field_name}"
