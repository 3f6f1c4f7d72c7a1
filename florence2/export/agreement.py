"""The last part of the proof: the exported folder answers as the model does, token for token."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from florence2.answers.answer import Answer
from florence2.export.prove import ProofError
from florence2.lite.florence import Florence2Lite
from florence2.lite.loading import load
from florence2.pipeline import Florence2

TASKS = ("<CAPTION>", "<OD>")
_BEAMS = (1, 3)  # greedy search, and the beams that the published checkpoints ask for
_LONGEST = 40  # ids of an answer
_SIZE = 640, 480


@dataclass(frozen=True)
class Agreement:
    """How many answers had the same tokens."""

    same: int
    answers: int
    first: str = ""
    """Which question was the first whose answer differs."""

    def __str__(self) -> str:
        return f"{self.same} of {self.answers} answers have the same tokens"


def prove_answers(folder: Path, model: Florence2, rounded: bool) -> Agreement:
    """Compare answers about one image, by greedy search and with three beams.

    Args:
        folder: The folder of the export.
        model: The model that it was made from, before any rounding.
        rounded: Whether the export holds other weights than the model.

    Raises:
        ProofError: An answer has other tokens.
    """
    agreement = compare_answers(folder, model, images=1)
    if agreement.same < agreement.answers:
        reason = (
            "its weights are rounded to float16; export with --weights float32"
            if rounded
            else "though every graph agrees with the model"
        )
        raise ProofError(f"The export answers {agreement.first} with other tokens: {reason}. Nothing was written.")
    return agreement


def compare_answers(folder: Path, model: Florence2, images: int) -> Agreement:
    """Answer the same questions about synthetic images with both; return how many answers have the same tokens."""
    exported = load(folder)
    same, differing = 0, []
    for image in synthetic_images(images):
        for question, one, other in zip(_questions(), _answers(model, image), _answers(exported, image), strict=True):
            if (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason):
                same += 1
            else:
                differing.append(question)
    return Agreement(same, same + len(differing), *differing[:1])


def _questions() -> list[str]:
    return [
        f"{task} with {beams} beams" if beams > 1 else f"{task} by greedy search" for task in TASKS for beams in _BEAMS
    ]


def _answers(model: Florence2 | Florence2Lite, image: Image.Image) -> Iterator[Answer]:
    """Yield the answers to all questions about an image, which is encoded once."""
    encoded = model.encode_image(image)
    for task in TASKS:
        for beams in _BEAMS:
            yield model.run(
                task, encoded, num_beams=beams, num_return_sequences=1, max_new_tokens=_LONGEST, confidence=False
            )


def synthetic_images(count: int) -> Iterator[Image.Image]:
    """Yield images of some coloured shapes on a gradient, the same ones every time."""
    rng = np.random.default_rng(0)
    width, height = _SIZE
    for _ in range(count):
        ramp = np.linspace(rng.integers(0, 128, 3), rng.integers(128, 256, 3), width)  # (width, 3)
        image = Image.fromarray(np.broadcast_to(ramp.astype(np.uint8), (height, width, 3)))
        draw = ImageDraw.Draw(image)
        for shape in (draw.rectangle, draw.ellipse, draw.rectangle, draw.ellipse):
            x, y, size = rng.integers(0, width * 3 // 4), rng.integers(0, height * 3 // 4), rng.integers(60, 160)
            shape((int(x), int(y), int(x + size), int(y + size)), fill=tuple(rng.integers(0, 256, 3).tolist()))
        yield image
