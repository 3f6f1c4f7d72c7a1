"""The result of a chain of tasks: a caption, the boxes of its phrases, and the outline of each box's object."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from florence2.answers.answer import Answer, Box, Polygon, Quad
from florence2.answers.confidence import check_least, is_sure
from florence2.inputs.image import ImageInput


@dataclass(frozen=True)
class Cascade:
    """A caption, the boxes of its phrases, and the outline of each box's object.

    Attributes:
        caption: The answer to a caption task.
        grounding: The answer to `<CAPTION_TO_PHRASE_GROUNDING>` with that caption.
        segments: One answer to `<REGION_TO_SEGMENTATION>` for each box of `grounding`, in its order. Their polygons
            are labelled with the box's phrase.
        missing: A sentence for each part that could not be computed; that part is an answer without text.
    """

    caption: Answer
    grounding: Answer
    segments: tuple[Answer, ...]
    missing: tuple[str, ...] = ()

    @classmethod
    def join(
        cls, caption: Answer, grounding: Answer, outlines: Sequence[Answer], missing: Sequence[str] = ()
    ) -> "Cascade":
        """Join the answers, and label each outline with the phrase of its box.

        Args:
            caption: The answer to a caption task.
            grounding: The answer with the caption's phrases.
            outlines: One answer for each box of `grounding`, in its order.
            missing: A sentence for each part that could not be computed.

        Returns:
            The cascade.
        """
        pairs = zip(outlines, grounding.boxes, strict=True)
        return cls(caption, grounding, tuple(_labelled(outline, box.label) for outline, box in pairs), tuple(missing))

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of the original image in pixels."""
        return self.caption.image_size

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes of the phrases."""
        return self.grounding.boxes

    @property
    def quads(self) -> tuple[Quad, ...]:
        """Always empty: no task of the chain answers with quadrilaterals."""
        return self.grounding.quads

    @property
    def polygons(self) -> tuple[Polygon, ...]:
        """The outlines of all phrases."""
        return tuple(polygon for segment in self.segments for polygon in segment.polygons)

    @property
    def is_cut_off(self) -> bool:
        """Whether the token limit ended any of the answers."""
        return any(answer.is_cut_off for answer in (self.caption, self.grounding, *self.segments))

    @property
    def left_out(self) -> int | None:
        """How many boxes and outlines `with_confidence` left out; None where it kept all. A box takes its outline."""
        counts = [answer.left_out for answer in (self.grounding, *self.segments) if answer.left_out is not None]
        return sum(counts) if counts else None

    def to_dict(self, tokens: bool = False) -> dict[str, Any]:
        """Return plain JSON values.

        Args:
            tokens: Include ids, log-probabilities and token texts.

        Returns:
            A dict with "caption" and "grounding", an answer each, and "segments", a list of answers; and "missing",
            if anything is.
        """
        values: dict[str, Any] = {
            "caption": self.caption.to_dict(tokens),
            "grounding": self.grounding.to_dict(tokens),
            "segments": [segment.to_dict(tokens) for segment in self.segments],
        }
        return values | ({"missing": list(self.missing)} if self.missing else {})

    def with_confidence(self, least: float) -> "Cascade":
        """Return the cascade without the boxes below a confidence of `least`, their outlines, and outlines below it.

        Args:
            least: A confidence, 0..1; 0 keeps every region.

        Returns:
            The same cascade with fewer boxes and outlines.

        Raises:
            OptionError: As `Answer.with_confidence`.
        """
        least = check_least(least)
        if least == 0:
            return self
        pairs = zip(self.grounding.boxes, self.segments, strict=True)
        segments = [part.with_confidence(least) for box, part in pairs if is_sure(box, least)]
        return replace(self, grounding=self.grounding.with_confidence(least), segments=tuple(segments))

    def draw(self, image: ImageInput) -> Image.Image:
        """Draw all boxes and filled outlines with their phrases.

        Args:
            image: The image that the cascade describes, in any form that `open_image` reads.

        Returns:
            A new RGB image of the same size.

        Raises:
            ImageError: The image cannot be read.
        """
        reason = "length" if self.is_cut_off else self.grounding.finish_reason
        return replace(self.grounding, polygons=self.polygons, finish_reason=reason).draw(image)

    def __str__(self) -> str:
        """Return the caption, the boxes and the outlines, then a line for each missing part."""
        parts = (self.caption, self.grounding, *self.segments)
        shown = [str(part) for part in parts if part.raw_text or not self.missing]  # a missing part has no text
        return "\n".join(line for line in (*shown, *self.missing) if line)


def _labelled(answer: Answer, label: str) -> Answer:
    return replace(answer, polygons=tuple(replace(polygon, label=label) for polygon in answer.polygons))
