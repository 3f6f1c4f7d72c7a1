"""The result of a chain of tasks: a caption, the boxes of its phrases, and the outline of each box's object."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from florence2.answers.answer import Answer, Box, Polygon, Quad
from florence2.inputs.image import ImageInput


@dataclass(frozen=True)
class Cascade:
    """A caption, the boxes of its phrases, and the outline of each box's object.

    Attributes:
        caption: The answer to a caption task.
        grounding: The answer to `<CAPTION_TO_PHRASE_GROUNDING>` with that caption.
        segments: One answer to `<REGION_TO_SEGMENTATION>` for each box of `grounding`, in its order. Their polygons
            are labelled with the box's phrase.
    """

    caption: Answer
    grounding: Answer
    segments: tuple[Answer, ...]

    @classmethod
    def join(cls, caption: Answer, grounding: Answer, outlines: Sequence[Answer]) -> "Cascade":
        """Join the answers, and label each outline with the phrase of its box.

        Args:
            caption: The answer to a caption task.
            grounding: The answer with the caption's phrases.
            outlines: One answer for each box of `grounding`, in its order.

        Returns:
            The cascade.
        """
        pairs = zip(outlines, grounding.boxes, strict=True)
        return cls(caption, grounding, tuple(_labelled(outline, box.label) for outline, box in pairs))

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

    def to_dict(self, tokens: bool = False) -> dict[str, Any]:
        """Return plain JSON values.

        Args:
            tokens: Include ids, log-probabilities and token texts.

        Returns:
            A dict with "caption" and "grounding", an answer each, and "segments", a list of answers.
        """
        return {
            "caption": self.caption.to_dict(tokens),
            "grounding": self.grounding.to_dict(tokens),
            "segments": [segment.to_dict(tokens) for segment in self.segments],
        }

    def draw(self, image: ImageInput) -> Image.Image:
        """Draw all boxes and filled outlines with their phrases.

        Args:
            image: The image that the cascade describes, in any form that `open_image` reads.

        Returns:
            A new RGB image of the same size.

        Raises:
            ImageError: The image cannot be read.
        """
        return replace(self.grounding, polygons=self.polygons).draw(image)

    def __str__(self) -> str:
        segments = "\n".join(str(segment) for segment in self.segments)
        return "\n".join(part for part in (str(self.caption), str(self.grounding), segments) if part)


def _labelled(answer: Answer, label: str) -> Answer:
    return replace(answer, polygons=tuple(replace(polygon, label=label) for polygon in answer.polygons))
