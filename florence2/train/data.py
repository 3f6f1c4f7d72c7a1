"""Turn samples into batches of tensors, in an order that depends only on the seed.

A sample is one image with one or more pairs of prompt and answer. The image is encoded once for all its pairs, which
saves time and changes neither the loss nor the gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from florence2.errors import Florence2Error, PromptError
from florence2.inputs.image import ImageInput
from florence2.model.florence2 import IGNORED_LABEL
from florence2.processor import Processor
from florence2.train.augmentation import augment
from florence2.train.samples import Sample, Samples
from florence2.train.settings import TrainSettings


@dataclass(frozen=True)
class Batch:
    """P images with E pairs; `image_index` (E,) is the image of each pair.

    `pixel_values` (P, 3, H, W); `input_ids` and `attention_mask` (E, S), 0 in the mask at padding; `labels` (E, T),
    -100 at padding. Neither padding nor the prompt is trained on. Where the vision tower is frozen, its outputs `grids`
    (P, h, w, C) may stand in place of the pixel values, which are empty then.
    """

    pixel_values: Tensor
    image_index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    grids: Tensor | None = field(default=None, kw_only=True)

    @property
    def num_labels(self) -> int:
        """Return the number of labels without padding."""
        return int((self.labels != IGNORED_LABEL).sum())

    def to(self, device: torch.device) -> "Batch":
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})


def make_batch(
    samples: Sequence[Sample],
    processor: Processor,
    max_length: int,
    read_grid: Callable[[ImageInput], Tensor] | None = None,
) -> Batch:
    """Make a batch of samples.

    Args:
        samples: At least one pair in all.
        processor: Turns images, prompts and answers into tensors.
        max_length: The model's positions. Longer answers are cut there and lose their end.
        read_grid: Returns the output (h, w, C) of a frozen vision tower for an image; None takes the pixel values.

    Raises:
        PromptError: The processor refuses a prompt, or no sample has one.
        ImageError: An image cannot be read.
    """
    pad = processor.tokenizer.token_id("<pad>")
    assert pad is not None
    images, image_index, prompts, labels = [], [], [], []
    for index, sample in enumerate(samples):
        with naming(sample):
            images.append(processor.image(sample.image) if read_grid is None else read_grid(sample.image)[None])
            for prefix, suffix in sample.pairs:
                prompts.append(processor.prompt(prefix))
                labels.append(processor.encode(suffix)[:max_length])
                image_index.append(index)
    if not prompts:
        raise PromptError("A batch without a single prompt has nothing to train on.")
    input_ids = _pad(prompts, pad)
    mask = _pad([[1] * len(ids) for ids in prompts], 0)
    rows = (torch.tensor(image_index), input_ids, mask, _pad(labels, IGNORED_LABEL))
    if read_grid is None:
        return Batch(torch.cat(images), *rows)
    return Batch(torch.empty(0), *rows, grids=torch.cat(images))


Collate = Callable[[Sequence[Sample], Processor, int], Batch]
"""A function that makes a batch of samples, as `make_batch` does."""


@contextmanager
def naming(sample: Sample) -> Iterator[None]:
    """Put the name of the sample before the message of an error."""
    try:
        yield
    except Florence2Error as error:
        raise type(error)(f"{sample.name or 'a sample'}: {error}") from None


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


class StepData(Dataset[list[Batch]]):
    """The data of one process: item `step` is its share of that update's images, as a list of micro-batches.

    The order of an epoch depends only on (seed, epoch). So training resumes at any step without reading earlier
    samples, and several processes together see what a single one would.
    """

    def __init__(
        self,
        samples: Samples,
        processor: Processor,
        settings: TrainSettings,
        max_length: int,
        rank: int = 0,
        processes: int = 1,
        collate: Collate = make_batch,
    ):
        if len(samples) < settings.batch:
            raise PromptError(
                f"{len(samples)} images are fewer than one batch of {settings.batch}. Give more, or a smaller batch."
            )
        if settings.batch < processes:
            raise PromptError(f"A batch of {settings.batch} images cannot be shared by {processes} processes.")
        self.samples, self.processor, self.settings, self.max_length = samples, processor, settings, max_length
        self.rank, self.processes, self.collate = rank, processes, collate

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> list[Batch]:
        chosen = [self._sample(step, i) for i in self.indices(step)[self.rank :: self.processes]]
        size = self.settings.micro_batch or len(chosen)
        parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        return [self.collate(part, self.processor, self.max_length) for part in parts]

    def _sample(self, step: int, index: int) -> Sample:
        """Return a sample as the epoch of a step shows it."""
        sample = self.samples[index]
        if not self.settings.varies_images:
            return sample
        with naming(sample):
            return augment(sample, self.processor, self.settings, step // self._steps_per_epoch, index)

    @property
    def _steps_per_epoch(self) -> int:
        return len(self.samples) // self.settings.batch

    def needed(self, first: int) -> list[int]:
        """Return the samples of the steps from `first` on, over all processes, in rising order and each once."""
        found: set[int] = set()
        for step in range(first, len(self)):
            if len(found) == len(self.samples):
                break
            found.update(self.indices(step))
        return sorted(found)

    def indices(self, step: int) -> list[int]:
        """Return the samples of a step, over all processes. An epoch leaves out the rest that fills no batch."""
        epoch, offset = divmod(step, self._steps_per_epoch)
        if epoch != getattr(self, "_epoch", None):
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            count = len(self.samples)
            shuffled = self.settings.shuffle
            self._order = torch.randperm(count, generator=generator) if shuffled else torch.arange(count)
            self._epoch = epoch
        start = offset * self.settings.batch
        return self._order[start : start + self.settings.batch].tolist()
