"""Vary the images of training data at random: mirror them, shrink them, change their colours. Locations follow.

The draws depend only on the run's seed, the epoch and the place of the sample, so a resumed run repeats them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

from PIL import Image, ImageEnhance, ImageOps

from florence2.inputs.coordinates import LOCATION, NUM_BINS, bins_to_tokens
from florence2.inputs.tasks import Task, find_task
from florence2.processor import Processor
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings

_RUN = re.compile(r"(?:<loc_[0-9]{1,3}><loc_[0-9]{1,3}>)+")
_SIDES = re.compile(r"\b(?:left|right)", re.IGNORECASE)

_Move = Callable[[Sequence[int], bool], Sequence[int]]
"""From the bins x, y, x, y, ... of a run of location tokens, and whether they are an outline, to other bins."""


def augment(sample: Sample, processor: Processor, settings: TrainSettings, epoch: int, index: int) -> Sample:
    """Return a sample as one epoch shows it.

    Args:
        sample: The image and its pairs.
        processor: The model's. Its tasks say what locations mean; its mean colour surrounds a shrunken image.
        settings: `flip`, `shrink` and `colour`, and the seed.
        epoch: The number of the epoch, from 0.
        index: The place of the sample in the data.

    Raises:
        ImageError: The image cannot be read.
    """
    random = Random(f"{settings.seed} {epoch} {index}")
    image, tasks = processor.open_image(sample.image), processor.tasks
    if random.random() < settings.flip and can_flip(sample, tasks):
        image, sample = ImageOps.mirror(image), move_locations(sample, tasks, _mirror)
    if settings.shrink < 1:
        frame = _draw_frame(random, image.size, settings.shrink)
        image = _paste(image, frame, processor.image_config.mean)
        sample = move_locations(sample, tasks, _shrinking(frame, image.size))
    if settings.colour > 0:
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(random.uniform(1 - settings.colour, 1 + settings.colour))
    return replace(sample, image=image)


def can_flip(sample: Sample, tasks: Mapping[str, Task]) -> bool:
    """Return whether the answers of a sample hold for the mirrored image, once their locations are mirrored.

    They do not where text is read or where left and right are named. Questions in words of one's own, and tasks of
    one's own that answer with text, may ask for anything; they are not mirrored.
    """
    return all(
        (task := find_task(prefix, tasks)) is not None
        and task.answer != "quads"
        and "OCR" not in task.token
        and not (task.keeps_token and task.answer == "text")
        and not _SIDES.search(prefix + suffix)
        for prefix, suffix in sample.pairs
    )


def move_locations(sample: Sample, tasks: Mapping[str, Task], move: _Move) -> Sample:
    """Return a sample with all location tokens moved, those of regions in its prompts included."""
    pairs = []
    for prefix, suffix in sample.pairs:
        task = find_task(prefix, tasks)
        outlined = task is not None and (task.answer == "polygons" or "<poly>" in suffix)
        pairs.append((_rewrite(prefix, move, False), _rewrite(suffix, move, outlined)))
    return replace(sample, pairs=tuple(pairs))


def _rewrite(text: str, move: _Move, outlined: bool) -> str:
    def moved(run: re.Match[str]) -> str:
        return bins_to_tokens(move([int(bin) for bin in LOCATION.findall(run.group())], outlined))

    return _RUN.sub(moved, text)


def _mirror(bins: Sequence[int], outlined: bool) -> list[int]:
    """Mirror x. The left side of a box becomes its right one; the points of an outline keep their sense of rotation."""
    xs, ys = [NUM_BINS - 1 - x for x in bins[::2]], list(bins[1::2])
    if outlined:
        xs, ys = xs[::-1], ys[::-1]
    else:
        for left in range(0, len(xs) - 1, 2):
            xs[left : left + 2] = xs[left + 1], xs[left]
    return [bin for point in zip(xs, ys, strict=True) for bin in point]


def _draw_frame(random: Random, size: tuple[int, int], least: float) -> tuple[int, int, int, int]:
    """Return x, y, width and height in pixels of the place, within an image of `size`, of its shrunken self."""
    scale = random.uniform(least, 1)
    width, height = (max(1, round(side * scale)) for side in size)
    return random.randint(0, size[0] - width), random.randint(0, size[1] - height), width, height


def _paste(image: Image.Image, frame: tuple[int, int, int, int], mean: Sequence[float]) -> Image.Image:
    """Return an image of the same size that shows the whole image in a frame, and the mean colour around it."""
    x, y, width, height = frame
    canvas = Image.new("RGB", image.size, tuple(round(255 * value) for value in mean))
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), (x, y))
    return canvas


def _shrinking(frame: tuple[int, int, int, int], size: tuple[int, int]) -> _Move:
    """Return the move of locations into a frame of an image of `size`: the centre of a bin falls into its new bin."""

    def move(bins: Sequence[int], outlined: bool) -> list[int]:  # noqa: ARG001
        places = []
        for place, bin in enumerate(bins):
            axis = place % 2
            start, length, side = frame[axis], frame[axis + 2], size[axis]
            places.append(min(NUM_BINS - 1, int(((bin + 0.5) * length + NUM_BINS * start) / side)))
        return places

    return move
