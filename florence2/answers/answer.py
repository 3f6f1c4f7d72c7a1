"""Read a generated text as an Answer: boxes, quads, polygons, labels and scores."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from florence2.answers.drawing import Shape, draw_shapes
from florence2.answers.parsing import Region, clean_label, find_regions, remove_markers
from florence2.answers.reference import reference_answer, reference_scores
from florence2.answers.score import score_regions, score_text
from florence2.inputs.coordinates import bins_to_pixels
from florence2.inputs.image import ImageInput, open_image
from florence2.inputs.tasks import AnswerKind


@dataclass(frozen=True)
class Box:
    """A labelled box: left, top, right, bottom in pixels of the picture given, in the order the model wrote them.

    `score` is the geometric mean of the probabilities the model gave its location tokens, 0..1 and uncalibrated;
    None when the answer was parsed from text without probabilities.
    """

    xyxy: tuple[float, float, float, float]
    label: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Quad:
    """A labelled quadrilateral, as of a line of text: x1, y1, ..., x4, y4 in pixels, clockwise from top left."""

    xyxyxyxy: tuple[float, ...]
    label: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Polygon:
    """One labelled object as one or more closed outlines, each x1, y1, x2, y2, ... in pixels."""

    rings: tuple[tuple[float, ...], ...]
    label: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Answer:
    """What the model said about one picture.

    `task` is the task's token, or the prompt itself where it had none. `text` is the answer without `<s>`, `</s>` and
    `<pad>`, `raw_text` with all of them; both keep location tokens. `token_ids` begin with the decoder's start id, so
    there is one more of them than of `token_logprobs`; both are empty for an answer parsed from text. `token_texts`
    are the texts of all ids, where there are log-probabilities. `score` is the geometric mean probability of
    the tokens of `text`. `finish_reason` is "stop", or "length" for an answer cut short.
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
    sequence_score: float | None = None
    finish_reason: str | None = None
    token_ids: tuple[int, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    token_texts: tuple[str, ...] = field(default=(), repr=False)
    alternatives: tuple["Answer", ...] = ()
    """The other hypotheses, best first, when more than one sequence was asked for."""

    def __str__(self) -> str:
        """The answer as a person reads it: the text, or a line for each thing found."""
        if self.kind == "text":
            return self.text.strip()
        rows: list[tuple[str, float | None, Sequence[float]]]
        rows = [(box.label, box.score, box.xyxy) for box in self.boxes]
        rows += [(quad.label, quad.score, quad.xyxyxyxy) for quad in self.quads]
        rows += [(polygon.label, polygon.score, ring) for polygon in self.polygons for ring in polygon.rings]
        return "\n".join(_line(*row) for row in rows) or "(nothing found)"

    def to_dict(self, tokens: bool = False) -> dict[str, Any]:
        """Plain JSON values of the fields that hold something; ids, log-probabilities and pieces only on request.

        The lists that this kind of answer fills are there even when they are empty.
        """
        hidden = ("alternatives",) if tokens else ("alternatives", "token_ids", "token_logprobs", "token_texts")
        values = {key: value for key, value in asdict(self).items() if key not in hidden}
        values["alternatives"] = [other.to_dict(tokens) for other in self.alternatives]
        kept = {key: value for key, value in values.items() if value not in (None, (), []) or key in _FILLS[self.kind]}
        plain: dict[str, Any] = json.loads(json.dumps(kept))
        return plain

    def to_json(self, tokens: bool = False) -> str:
        """`to_dict` as one line of JSON, Unicode kept."""
        return json.dumps(self.to_dict(tokens), ensure_ascii=False)

    def to_florence(self) -> dict[str, Any]:
        """The dict that the reference's `post_process_generation` returns for this text, quirks included.

        `<OD>` and `<DENSE_REGION_CAPTION>` get "scores" when the answer has token log-probabilities, as there.
        """
        answer = reference_answer(self.kind, self.raw_text, self.image_size)
        if self.kind == "boxes" and self.token_logprobs and answer["bboxes"]:
            answer["scores"] = reference_scores(self.token_texts, self.token_logprobs)
        return {self.task: answer}

    def draw(self, image: ImageInput) -> Image.Image:
        """The picture with boxes, quads and filled polygons drawn and labelled."""
        shapes = [Shape(_corners(box.xyxy), box.label) for box in self.boxes]
        shapes += [Shape(_pairs(quad.xyxyxyxy), quad.label) for quad in self.quads]
        for polygon in self.polygons:
            for i, ring in enumerate(polygon.rings):  # one title per object, and none where a box has it
                titled = i == 0 and not self.boxes
                shapes.append(Shape(_pairs(ring), polygon.label, filled=True, titled=titled))
        return draw_shapes(open_image(image), shapes)


_FILLS: dict[AnswerKind, tuple[str, ...]] = {
    "text": (),
    "boxes": ("boxes",),
    "proposals": ("boxes",),
    "phrases": ("boxes",),
    "quads": ("quads",),
    "polygons": ("polygons",),
    "boxes_or_polygons": ("boxes", "polygons"),
}


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
) -> Answer:
    """Read a generated text as an answer of the given kind.

    `image_size` is (width, height) in pixels. Scores need the next three: the ids with the start id first, the
    log-probability of each but that, and the text of each.
    """
    regions = find_regions(kind, raw_text)
    scores: list[float | None] = [None] * len(regions)
    if token_logprobs:
        scores = score_regions(kind, token_texts, token_logprobs)
    shapes = [_to_shape(region, image_size, score) for region, score in zip(regions, scores, strict=True)]
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
        sequence_score=sequence_score,
        finish_reason=finish_reason,
        token_ids=tuple(token_ids),
        token_logprobs=tuple(token_logprobs),
        token_texts=tuple(token_texts),
    )


def _to_shape(region: Region, image_size: tuple[int, int], score: float | None) -> Box | Quad | Polygon:
    label = clean_label(region.label)
    rows = [tuple(bins_to_pixels(bins, image_size)) for bins in region.bins]
    if region.shape == "polygon":
        return Polygon(tuple(row for row in rows if row), label, score)
    if region.shape == "quad":
        return Quad(rows[0], label, score)
    x1, y1, x2, y2 = rows[0]
    return Box((x1, y1, x2, y2), label, score)


def _line(label: str, score: float | None, coordinates: Sequence[float]) -> str:
    numbers = " ".join(f"{value:.1f}" for value in coordinates)
    return "  ".join(part for part in (label, "" if score is None else f"{score:.2f}", numbers) if part)


def _pairs(row: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(row[0::2], row[1::2], strict=True))


def _corners(xyxy: tuple[float, float, float, float]) -> list[tuple[float, float]]:
    x1, y1, x2, y2 = xyxy
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
