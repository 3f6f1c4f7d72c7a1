"""What stands at every place of a scene: the lesson in which nano's encoder learns to see.

An answer says little about the picture, and says it late: from answers alone, a small model learns for hours which
words there are before it looks. So each image token is asked what it lies on, and where that thing's corners are. All
is read off the encoder's memory by one linear map for each question, which is what a decoder's attention can do, and
corners are read off through the location tokens' own embeddings. (Microsoft's model began from encoders that had
learnt to see elsewhere: paper section 4.1.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.inputs.coordinates import NUM_BINS, pixels_to_bins
from florence2.model.florence2 import IGNORED_LABEL, Florence2Model
from florence2.processor import Processor
from florence2.train.data import Batch, Sample, make_batch
from florence2.train.loss import LossModule
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
    **{f"character {number}": ("", *LETTERS, *DIGITS) for number in range(4)},
}
"""What is asked about every place, and the answers; where no thing is, the last six are not asked."""
NUM_CORNERS = 12
"""Numbers of a place's thing: its box, and four points of its outline, for print the quad."""
_CORNERS_WEIGHT = 3.0


@dataclass(frozen=True)
class SceneSample(Sample):
    """A sample that remembers its scene."""

    scene: Scene | None = None


@dataclass(frozen=True)
class SceneBatch(Batch):
    """A batch with what is to be seen: N places of each picture, row by row.

    `answers` (P, N, questions) in the order of QUESTIONS and `corners` (P, N, NUM_CORNERS), bins; -100 where there
    is nothing to answer.
    """

    answers: Tensor
    corners: Tensor


def make_scene_batch(samples: Sequence[Sample], processor: Processor, max_length: int, grid: int) -> SceneBatch:
    """As `make_batch`, for SceneSamples and a grid of `grid` x `grid` image tokens."""
    batch = make_batch(samples, processor, max_length)
    places = [look(sample.scene, grid) for sample in samples if isinstance(sample, SceneSample) and sample.scene]
    answers, corners = (torch.stack(values) for values in zip(*places, strict=True))
    return SceneBatch(**vars(batch), answers=answers, corners=corners)


def look(scene: Scene, grid: int) -> tuple[Tensor, Tensor]:
    """The answers (grid², questions) and corners (grid², NUM_CORNERS) of a scene."""
    width, height = scene.image.size
    answers = torch.full((grid, grid, len(QUESTIONS)), IGNORED_LABEL)
    answers[..., 0] = QUESTIONS["background"].index(scene.background)
    answers[..., 1:3] = 0
    corners = torch.full((grid, grid, NUM_CORNERS), IGNORED_LABEL)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        # places whose centre lies within the box
        columns = slice(round(left / width * grid), max(round(right / width * grid), round(left / width * grid) + 1))
        rows = slice(round(top / height * grid), max(round(bottom / height * grid), round(top / height * grid) + 1))
        answers[rows, columns, 1:] = torch.tensor(_describe(thing))
        points = [thing.outline[number * len(thing.outline) // 4] for number in range(4)]
        numbers = (*thing.box, *(value for point in points for value in point))
        corners[rows, columns] = torch.tensor(pixels_to_bins(numbers, scene.image.size))
    return answers.flatten(0, 1), corners.flatten(0, 1)


def _describe(thing: Thing) -> list[int]:
    said = [thing.category, thing.color, thing.size, thing.texture, *(thing.text[n : n + 1] for n in range(4))]
    return [answers.index(word) for answers, word in zip(list(QUESTIONS.values())[1:], said, strict=True)]


class PlacesLoss(LossModule):
    """The loss of a SceneBatch: of what the encoder's memory says about every place, and of its answers."""

    def __init__(self, model: Florence2Model, first_location: int):
        """`first_location` is the id of `<loc_0>`."""
        super().__init__(model)
        self.first_location = first_location
        self.speaks = True
        """Whether answers are asked for; before the model speaks the decoder is left out."""
        width = model.config.text.d_model
        self.readers = nn.ModuleList(nn.Linear(width, len(answers)) for answers in QUESTIONS.values())
        self.corners = nn.Linear(width, NUM_CORNERS * width)

    def forward(self, batch: Batch) -> Tensor:
        """Summed over the batch's labels, as LossModule does; the places' mean is added once for each label."""
        assert isinstance(batch, SceneBatch)
        model, asked = self.model, batch if self.speaks else _first_questions(batch)
        features = model.encode_image(batch.pixel_values)[asked.picture]
        memory = model.encode(features, asked.input_ids, asked.attention_mask)
        start = features.shape[1] - batch.answers.shape[1]  # the pooled token comes before the places
        firsts = memory[_first_rows(asked.picture), start : features.shape[1]]
        seen: Tensor = self.places_loss(firsts, batch) * batch.num_labels
        if not self.speaks:
            return seen
        mask = model.memory_mask(features, batch.attention_mask)
        return seen + model.memory_loss(memory, batch.labels, mask, reduction="sum")

    def places_loss(self, places: Tensor, batch: SceneBatch) -> Tensor:
        """(P, N, D) -> the sum over questions of their mean cross-entropies; corners count for _CORNERS_WEIGHT."""
        losses = [
            F.cross_entropy(reader(places).flatten(0, 1).float(), answers.flatten(), ignore_index=IGNORED_LABEL)
            for reader, answers in zip(self.readers, batch.answers.unbind(-1), strict=True)
        ]
        known = batch.corners[..., 0] != IGNORED_LABEL  # (P, N)
        read = self.corners(places[known]).unflatten(-1, (NUM_CORNERS, -1))
        table = self.model.language_model.shared.weight[self.first_location :][:NUM_BINS]
        corners = F.cross_entropy((read @ table.T).flatten(0, 1).float(), batch.corners[known].flatten())
        return torch.stack(losses).sum() + _CORNERS_WEIGHT * corners


def _first_rows(picture: Tensor) -> Tensor:
    """The first row of every picture, of `picture` (E,) in rising order."""
    return torch.nonzero(torch.diff(picture, prepend=picture.new_tensor([-1])))[:, 0]


def _first_questions(batch: SceneBatch) -> SceneBatch:
    rows = _first_rows(batch.picture)
    asked = {name: getattr(batch, name)[rows] for name in ("picture", "input_ids", "attention_mask", "labels")}
    return replace(batch, **asked)
