"""The loss that teaches nano's encoder to see: what each image token lies on.

Answers carry little information about the image. From answers alone, a small model learns for hours which words
exist before it uses the image at all. So every image token is asked what it lies on and where that thing's corners
are. One linear map for each question reads the answers from the memory, as a decoder's attention could; corners are
read through the embeddings of the location tokens. (Microsoft's model started from pretrained encoders instead: paper
section 4.1.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.inputs.coordinates import NUM_BINS, pixels_to_bins
from florence2.model.florence2 import IGNORED_LABEL, Florence2Model
from florence2.processor import Processor
from florence2.train.data import Batch, make_batch
from florence2.train.loss import LossModule
from florence2.train.samples import Sample
from recipes.nano.scenes import BACKGROUNDS, COLORS, DIGITS, LETTERS, SHAPES, Scene, Thing

QUESTIONS: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "category": (
        "nothing",
        *SHAPES,
        *(f"letter {letter}" for letter in LETTERS),
        *(f"digit {digit}" for digit in DIGITS),
        "word",
    ),
    "color": ("nothing", *COLORS),
    "size": ("small", "large"),
    "texture": ("plain", "striped", "dotted"),
    **{f"character {position}": ("", *LETTERS, *DIGITS) for position in range(4)},
}
"""The questions about every place, with their answers. On the bare background, the last six are not asked."""
NUM_CORNERS = 12
"""Coordinates of a place's thing: its box and four points of its outline (the quad if it is printed text)."""
_CORNERS_WEIGHT = 3.0


@dataclass(frozen=True)
class SceneSample(Sample):
    """A sample that keeps its scene."""

    scene: Scene | None = None


@dataclass(frozen=True)
class SceneBatch(Batch):
    """A batch with the answers for the N places of each image, row by row.

    `answers` (P, N, questions) are in the order of QUESTIONS, `corners` (P, N, NUM_CORNERS) are bins; both are -100
    where there is nothing to answer.
    """

    answers: Tensor
    corners: Tensor


def make_scene_batch(samples: Sequence[Sample], processor: Processor, max_length: int, grid: int) -> SceneBatch:
    """Make a batch of SceneSamples, as `make_batch` does, for `grid` x `grid` image tokens."""
    batch = make_batch(samples, processor, max_length)
    places = [look(sample.scene, grid) for sample in samples if isinstance(sample, SceneSample) and sample.scene]
    answers, corners = (torch.stack(values) for values in zip(*places, strict=True))
    return SceneBatch(**vars(batch), answers=answers, corners=corners)


def look(scene: Scene, grid: int) -> tuple[Tensor, Tensor]:
    """Return the answers (grid², questions) and corners (grid², NUM_CORNERS) of a scene."""
    width, height = scene.image.size
    answers = torch.full((grid, grid, len(QUESTIONS)), IGNORED_LABEL)
    answers[..., 0] = QUESTIONS["background"].index(scene.background)
    answers[..., 1:3] = 0
    corners = torch.full((grid, grid, NUM_CORNERS), IGNORED_LABEL)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        # the places whose centre lies in the box, and at least one
        columns = slice(round(left / width * grid), max(round(right / width * grid), round(left / width * grid) + 1))
        rows = slice(round(top / height * grid), max(round(bottom / height * grid), round(top / height * grid) + 1))
        answers[rows, columns, 1:] = torch.tensor(_describe(thing))
        points = [thing.outline[quarter * len(thing.outline) // 4] for quarter in range(4)]
        coordinates = (*thing.box, *(value for point in points for value in point))
        corners[rows, columns] = torch.tensor(pixels_to_bins(coordinates, scene.image.size))
    return answers.flatten(0, 1), corners.flatten(0, 1)


def _describe(thing: Thing) -> list[int]:
    words = [thing.category, thing.color, thing.size, thing.texture, *(thing.text[n : n + 1] for n in range(4))]
    return [answers.index(word) for answers, word in zip(list(QUESTIONS.values())[1:], words, strict=True)]


class PlacesLoss(LossModule):
    """The loss of a SceneBatch: of the places, read from the memory, and of the answers."""

    def __init__(self, model: Florence2Model, first_location: int):
        """Add the linear maps to `model`; `first_location` is the id of `<loc_0>`."""
        super().__init__(model)
        self.first_location = first_location
        self.speaks = True
        """If set, the loss includes the answers; otherwise the decoder is not run."""
        width = model.config.text.d_model
        self.readers = nn.ModuleList(nn.Linear(width, len(answers)) for answers in QUESTIONS.values())
        self.corners = nn.Linear(width, NUM_CORNERS * width)

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss summed over the batch's labels, as LossModule does; the mean over places counts per label."""
        assert isinstance(batch, SceneBatch)
        model, questions = self.model, batch if self.speaks else _first_questions(batch)
        features = model.encode_image(batch.pixel_values)[questions.image_index]
        memory = model.encode(features, questions.input_ids, questions.attention_mask)
        start = features.shape[1] - batch.answers.shape[1]  # pooled tokens come first
        firsts = memory[_first_rows(questions.image_index), start : features.shape[1]]
        seen: Tensor = self.places_loss(firsts, batch) * batch.num_labels
        if not self.speaks:
            return seen
        mask = model.memory_mask(features, batch.attention_mask)
        return seen + model.memory_loss(memory, batch.labels, mask, reduction="sum")

    def places_loss(self, places: Tensor, batch: SceneBatch) -> Tensor:
        """Sum the mean cross-entropies of all questions over `places` (P, N, D); corners weigh _CORNERS_WEIGHT."""
        losses = [
            F.cross_entropy(reader(places).flatten(0, 1).float(), answers.flatten(), ignore_index=IGNORED_LABEL)
            for reader, answers in zip(self.readers, batch.answers.unbind(-1), strict=True)
        ]
        labelled = batch.corners[..., 0] != IGNORED_LABEL  # (P, N)
        read = self.corners(places[labelled]).unflatten(-1, (NUM_CORNERS, -1))
        table = self.model.language_model.shared.weight[self.first_location :][:NUM_BINS]
        corners = F.cross_entropy((read @ table.T).flatten(0, 1).float(), batch.corners[labelled].flatten())
        return torch.stack(losses).sum() + _CORNERS_WEIGHT * corners


def _first_rows(image_index: Tensor) -> Tensor:
    """Return the first row of every image; `image_index` (E,) is in rising order."""
    return torch.nonzero(torch.diff(image_index, prepend=image_index.new_tensor([-1])))[:, 0]


def _first_questions(batch: SceneBatch) -> SceneBatch:
    """Keep one question for each image: what the places show depends little on the prompt."""
    rows = _first_rows(batch.image_index)
    kept = {name: getattr(batch, name)[rows] for name in ("image_index", "input_ids", "attention_mask", "labels")}
    return replace(batch, **kept)
