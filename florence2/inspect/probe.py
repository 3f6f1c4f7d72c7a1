"""Probes: how well a linear read-out predicts something from a value of the model.

    probe = fit_probe(f, "photos/", {"a.jpg": 3.0, "b.jpg": 1.0, ...}, "encoder.layers.2")
    print(probe)                                    # R2 on held-out images, against predicting the mean
    probe.predict(f, ["new.jpg"])

A value is pooled to one row of numbers as soon as its image has been processed, so only one row per image is held.
Numbers are read out by ridge regression, in closed form; classes, given as text, by multinomial logistic regression
with the same penalty. Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from florence2.errors import OptionError, plain
from florence2.generation.options import GenerationOptions
from florence2.inputs.processor import TaskText
from florence2.inspect.probe_data import Images, Target, encode_targets, list_images, order_targets
from florence2.inspect.progress import ProgressCallback, ignore_progress
from florence2.inspect.regression import fit_classes, fit_numbers, measure_scores, predict_constant
from florence2.pipeline import AnyImage, EncodedImage, Florence2
from florence2.tracing.names import Name, names_of
from florence2.tracing.recording import trace
from florence2.tracing.selection import select

Position: TypeAlias = "Literal['mean', 'max', 'last'] | int | Callable[[Tensor], Tensor]"
"""How a value is pooled to one row: over its positions, at one of them, or by a function of its `own_shape`."""
_PLACES = frozenset(("S", "N", "P", "M", "h", "w", "h·w", "windows", "H", "W", "T", "steps"))
_LEAST = 4  # images


@dataclass(frozen=True, eq=False)
class Reading:
    """What a probe reads: the value of one name in a run of one prompt, and how the value is pooled."""

    name: str
    task: str
    text: TaskText
    position: Position
    options: GenerationOptions | None


@dataclass(frozen=True, eq=False)
class Probe(Reading):
    """A fitted read-out and its scores: R2 for numbers, accuracy for classes.

    Attributes:
        name: The name of the value.
        task: The task of the runs.
        text: The input of the task.
        position: How the value is pooled.
        options: The generation settings of the runs; None for the model's defaults.
        ridge: The penalty.
        classes: The classes; None for numbers.
        train: The numbers of the images used for training.
        held_out: The numbers of the other images.
        score: The score on the held-out images, averaged over the columns of numbers.
        scores: The score of each column.
        train_score: The score on the training images.
        baseline: The score on the held-out images of predicting the training images' mean or most frequent class.
        weight: (features, columns or classes), float64, for the value without standardisation.
        bias: (columns or classes,), float64.
    """

    ridge: float
    classes: tuple[str, ...] | None
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    score: float
    scores: tuple[float, ...]
    train_score: float
    baseline: float
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)

    def predict(self, f: Florence2, images: Images) -> list[Any]:
        """Read out of new images.

        Args:
            f: The model.
            images: A list of images, or a folder.

        Returns:
            For each image a number, a row of numbers, or a class.

        Raises:
            OptionError: The value does not exist in this model, or no images are given.
        """
        return self.read(collect(f, list_images(images)[0], self))

    def read(self, features: Tensor) -> list[Any]:
        """Read out of rows that are already collected: (images, features)."""
        out = features.double() @ self.weight + self.bias
        if self.classes is not None:
            return [self.classes[i] for i in out.argmax(dim=1).tolist()]
        numbers: list[Any] = (out[:, 0] if out.shape[1] == 1 else out).tolist()
        return numbers

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, including the weights."""
        position = self.position if isinstance(self.position, str | int) else "a function"
        values = vars(self) | {
            "position": position,
            "options": None if self.options is None else self.options.to_dict(),
            "weight": self.weight.tolist(),
            "bias": self.bias.tolist(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    def __str__(self) -> str:
        measure = "R2" if self.classes is None else "accuracy"
        count = f"{len(self.train)} images, {len(self.held_out)} held out, {len(self.weight)} features"
        return (
            f"{self.name}  {measure} {self.score:.4f}  (baseline {self.baseline:.4f}, in training "
            f"{self.train_score:.4f}; {count})"
        )


def fit_probe(
    f: Florence2,
    images: Images,
    targets: Sequence[Target] | Mapping[str, Target],
    name: str,
    task: str = "<CAPTION>",
    text: TaskText = None,
    *,
    position: Position = "mean",
    ridge: float = 1.0,
    held_out: float = 0.25,
    seed: int = 0,
    options: GenerationOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Probe:
    """Fit a linear read-out of targets on one value of a run on each image.

    For numbers it minimises the sum of squared errors + `ridge` |w|^2, where w are the weights of standardised
    features; for classes the sum of cross-entropies + `ridge` / 2 |w|^2.

    Args:
        f: The model.
        images: A folder, or a list of images.
        targets: One for each image, in their order (in a folder, sorted by path), or a mapping by file name for a
            folder: numbers, rows of numbers, or classes as text.
        name: The name of the value (see `florence2.tracing.names`).
        task: The task of the runs. The prompt is part of what the encoder reads, and the answer of what the decoder
            reads.
        text: The input of the task.
        position: How to pool the value: "mean", "max", "last", a position, or a function of the value.
        ridge: The penalty, 0 or more.
        held_out: The share of the images, between 0 and 1, that is not used for training.
        seed: The seed by which these are chosen.
        options: Generation settings, used when `name` belongs to the decoder.
        progress: Called as progress(done, total) after each image.

    Returns:
        The fitted probe.

    Raises:
        OptionError: An argument does not exist or fit.
    """
    listed, files = list_images(images)
    classes, y = encode_targets(order_targets(targets, listed, files))
    _check_settings(len(listed), ridge, held_out)
    train, rest = _split(len(listed), held_out, seed)
    if classes is not None and len(set(y[train].tolist())) < 2:
        raise OptionError(
            f"All training images have the class {classes[int(y[train[0]])]!r}; give more images of other classes, or "
            "another seed."
        )
    reading = Reading(name, task, text, position, options)
    features = collect(f, listed, reading, progress or ignore_progress)
    return make_probe(features, y, classes, train, rest, ridge, reading)


def collect(
    f: Florence2, images: Sequence[AnyImage], reading: Reading, report: ProgressCallback = ignore_progress
) -> Tensor:
    """Return the pooled value of each image: (images, features), float64, on the CPU."""
    known, position = _find_name(f, reading.name), plain(reading.position)
    if type(position) is not int and position not in ("mean", "max", "last") and not callable(position):
        raise OptionError(f"position is {position!r}; it must be 'mean', 'max', 'last', a number, or a function.")
    if not images:
        raise OptionError("No images to read from; give at least one.")
    rows = []
    for done, image in enumerate(images, 1):
        rows.append(_pool(_read_value(f, image, reading, known), known, position))
        report(done, len(images))
    if len({len(row) for row in rows}) > 1:
        raise OptionError(
            f"{reading.name} pooled by {position!r} has {sorted({len(row) for row in rows})} numbers in different "
            "images; a probe needs the same number in each."
        )
    return torch.stack(rows)


def _read_value(f: Florence2, image: AnyImage, reading: Reading, known: Name) -> Tensor:
    options = reading.options
    if known.when != "step":  # values from before the answer need only one step of it
        options = f.options(num_beams=1, num_return_sequences=1, max_new_tokens=1, min_new_tokens=0)
    with trace(f, f"={known.name}") as t:
        if known.when == "image":
            if isinstance(image, EncodedImage):
                raise OptionError(f"{known.name} is inside the vision tower; give the image itself, not encoded.")
            f.encode_image(image)
        else:
            f.run(reading.task, image, reading.text, options=options)
    return t.along_answer(known.name) if "K" in known.own_shape else t[known.name]


def make_probe(
    features: Tensor,
    y: Tensor,
    classes: tuple[str, ...] | None,
    train: Sequence[int],
    held_out: Sequence[int],
    ridge: float,
    reading: Reading,
) -> Probe:
    """Fit and score on features (images, F) and targets: (images, columns) numbers, or (images,) classes."""
    x, rows, rest = features.double(), list(train), list(held_out)
    mean, deviation = x[rows].mean(dim=0), x[rows].std(dim=0, correction=0)
    scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    z = (x[rows] - mean) / scale
    if classes is None:
        inner, constant = fit_numbers(z, y[rows], ridge)
    else:
        inner, constant = fit_classes(z, y[rows], ridge, len(classes))
    weight = inner / scale[:, None]
    bias = constant - mean @ weight
    out = x @ weight + bias
    scores = measure_scores(out[rest], y[rest], classes)
    guess = predict_constant(y[rows], classes).expand_as(out[rest])
    return Probe(
        **vars(reading),
        ridge=ridge,
        classes=classes,
        train=tuple(rows),
        held_out=tuple(rest),
        score=_mean(scores),
        scores=tuple(scores),
        train_score=_mean(measure_scores(out[rows], y[rows], classes)),
        baseline=_mean(measure_scores(guess, y[rest], classes)),
        weight=weight,
        bias=bias,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pool(value: Tensor, known: Name, position: Position) -> Tensor:
    """Pool the value of one image to a row: its positions pooled, heads and channels side by side."""
    if not isinstance(position, str | int):
        return position(value).detach().flatten().double().cpu()
    letters = [letter for letter in known.own_shape if letter != "K"]
    # the last dimension is never pooled: attended positions are not positions of the value itself
    places = [dim for dim, letter in enumerate(letters[:-1]) if letter in _PLACES]
    rest = [dim for dim in range(value.dim()) if dim not in places]
    flat = value.detach().double().cpu().permute(*places, *rest).reshape(-1, *(value.shape[dim] for dim in rest))
    if position == "mean":
        return flat.mean(dim=0).flatten()
    if position == "max":
        return flat.amax(dim=0).flatten()
    at = len(flat) - 1 if position == "last" else int(position)
    if not 0 <= at < len(flat):
        raise OptionError(f"position is {at}; {known.name} has {len(flat)} positions, 0 to {len(flat) - 1}.")
    return flat[at].flatten()


def _find_name(f: Florence2, name: str) -> Name:
    known = {entry.name: entry for entry in names_of(f.model.config) if not entry.searched}
    select([name], list(known.values()), exactly=True)
    if name not in known:
        raise OptionError(f"{name!r} is a pattern; a probe reads one name.")
    return known[name]


def _check_settings(count: int, ridge: float, held_out: float) -> None:
    if not isinstance(ridge, Real) or not 0 <= ridge < math.inf:
        raise OptionError(f"ridge is {ridge!r}; it must be a number of 0 or more.")
    if not isinstance(held_out, Real) or not 0 < held_out < 1:
        raise OptionError(f"held_out is {held_out}; it must be a share between 0 and 1.")
    if count < _LEAST:
        raise OptionError(f"A probe needs at least {_LEAST} images, not {count}.")


def _split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the images into training and held-out ones, at least two of each."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(max(2, round(count * share)), count - 2)
    return sorted(order[held:]), sorted(order[:held])
