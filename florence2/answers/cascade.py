"""The result of a chain of tasks: a caption, its phrases found in the picture, and the outline of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from florence2.answers.answer import Answer, Box, Polygon, Quad
from florence2.inputs.image import ImageInput


@dataclass(frozen=True)
class Cascade:
    """A caption, its phrases found in the picture, and the outline of each."""

    caption: Answer
    grounding: Answer
    segments: tuple[Answer, ...]
    """One for each box of `grounding`, in its order; the polygons bear the box's phrase."""

    @classmethod
    def join(cls, caption: Answer, grounding: Answer, outlines: Sequence[Answer]) -> "Cascade":
        """Put the answers together: the `outlines`, one for each box of `grounding`, under the phrase of its box."""
        named = zip(outlines, grounding.boxes, strict=True)
        return cls(caption, grounding, tuple(_labelled(outline, box.label) for outline, box in named))

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
        """Plain JSON values: one answer, one answer, a list of answers."""
        return {
            "caption": self.caption.to_dict(tokens),
            "grounding": self.grounding.to_dict(tokens),
            "segments": [segment.to_dict(tokens) for segment in self.segments],
        }

    def draw(self, image: ImageInput) -> Image.Image:
        """The picture with every phrase's boxes and filled outlines."""
        return replace(self.grounding, polygons=self.polygons).draw(image)

    def __str__(self) -> str:
        segments = "\n".join(str(segment) for segment in self.segments)
        return "\n".join(part for part in (str(self.caption), str(self.grounding), segments) if part)


def _labelled(answer: Answer, label: str) -> Answer:
    return replace(answer, polygons=tuple(replace(polygon, label=label) for polygon in answer.polygons))
