"""Probes: how much of something a linear read-out finds in a value of the model.

    probe = fit_probe(f, "photos/", {"a.jpg": 3.0, "b.jpg": 1.0, ...}, "encoder.layers.2")
    print(probe)                                    # R2 on pictures held out, against guessing the mean
    probe.predict(f, ["new.jpg"])

A value is pooled to one row of numbers as soon as its picture has been seen, so memory holds a row for each picture.
Numbers are read out by ridge regression, in closed form; classes, given as text, by multinomial logistic regression
with the same penalty. Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016).
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.bulk.batch import find_pictures
from florence2.bulk.sinks import Progress
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.inputs.processor import TaskText
from florence2.pipeline import AnyImage as Picture
from florence2.pipeline import EncodedImage, Florence2
from florence2.tracing.names import Name, names_of, select
from florence2.tracing.recording import trace

Position: TypeAlias = "Literal['mean', 'max', 'last'] | int | Callable[[Tensor], Tensor]"
"""How a value becomes one row: over its positions, at one of them, or by a function of it in the shape `own_shape`."""
Target: TypeAlias = "str | float | Sequence[float]"
_PLACES = frozenset(("S", "N", "P", "M", "h", "w", "h·w", "windows", "H", "W", "T", "steps"))
_LEAST = 4  # pictures


@dataclass(frozen=True, eq=False)
class Probe:
    """A read-out and how good it is. `score` is R2 of numbers, and of classes the share that is right.

    All of `score`, `train_score` and `baseline` are means over the columns of numbers; `scores` has each. The baseline
    guesses the mean, or the most frequent class, of the pictures that were trained on.
    """

    name: str
    task: str
    text: TaskText
    position: Position
    options: GenerationOptions | None
    ridge: float
    classes: tuple[str, ...] | None
    """None for numbers."""
    train: tuple[int, ...]
    """Which of the pictures were trained on."""
    held_out: tuple[int, ...]
    score: float
    """On the pictures held out."""
    scores: tuple[float, ...]
    train_score: float
    baseline: float
    """Of the pictures held out."""
    weight: Tensor = field(repr=False)
    """(features, columns or classes), float64, of the value as it is."""
    bias: Tensor = field(repr=False)

    def predict(self, f: Florence2, pictures: "Sequence[Picture] | str | os.PathLike[str]") -> list[Any]:
        """The numbers, rows of numbers where there are several columns, or classes that the probe reads out."""
        features = collect(f, _listed(pictures)[0], self.name, self.task, self.text, self.position, self.options)
        return self.read(features)

    def read(self, features: Tensor) -> list[Any]:
        """The same from rows that are collected already: (pictures, features)."""
        out = features.double() @ self.weight + self.bias
        if self.classes is not None:
            return [self.classes[i] for i in out.argmax(dim=1).tolist()]
        found: list[Any] = (out[:, 0] if out.shape[1] == 1 else out).tolist()
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the weights."""
        own = {key: value for key, value in vars(self).items() if key not in ("weight", "bias", "position", "options")}
        position = self.position if isinstance(self.position, str | int) else "a function"
        asked = None if self.options is None else asdict(self.options)
        values = own | {
            "position": position,
            "options": asked,
            "weight": self.weight.tolist(),
            "bias": self.bias.tolist(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    def __str__(self) -> str:
        what = "R2" if self.classes is None else "accuracy"
        count = f"{len(self.train)} pictures, {len(self.held_out)} held out, {len(self.weight)} features"
        return (
            f"{self.name}  {what} {self.score:.4f}  (baseline {self.baseline:.4f}, in training {self.train_score:.4f}; "
            f"{count})"
        )


def fit_probe(
    f: Florence2,
    pictures: "Sequence[Picture] | str | os.PathLike[str]",
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
) -> Probe:
    """Fit a linear read-out of `targets` on the value `name` of one run on each picture.

    `pictures` are a folder, or pictures of any kind; `targets` one for each, in the order of the pictures (of a
    folder, of their paths), or for a folder by file name: numbers, rows of numbers, or classes as text. `task` and
    `text` are what is asked: the prompt is part of what the encoder sees, and a name of the decoder is of the steps
    of the answer. `position` pools: "mean", "max", "last" or a number counted along all positions, or a function.
    What is minimised is the sum of squared errors + `ridge` |w|^2, w the weights of standardised features; of classes
    the sum of cross-entropies + `ridge` / 2 |w|^2. A share `held_out` of the pictures, chosen by `seed`, is not trained
    on. `options` are of the search, for names of the decoder. How far the work is goes to stderr. Raises OptionError
    for what does not exist or fit.
    """
    listed, files = _listed(pictures)
    given = _in_order(targets, listed, files)
    classes, y = _encode_targets(given)
    _check_settings(len(listed), ridge, held_out)
    train, rest = _split(len(listed), held_out, seed)
    if classes is not None and len(set(y[train].tolist())) < 2:
        raise OptionError(
            f"The pictures to train on are all of the class {classes[int(y[train[0]])]!r}; give more of the others, or "
            "another seed."
        )
    features = collect(f, listed, name, task, text, position, options)
    return make_probe(features, y, classes, train, rest, ridge, (name, task, text, position, options))


def collect(
    f: Florence2,
    pictures: Sequence[Picture],
    name: str,
    task: str,
    text: TaskText,
    position: Position,
    options: GenerationOptions | None = None,
) -> Tensor:
    """The pooled value of each picture: (pictures, features), float64, on the CPU."""
    known = _find_name(f, name)
    if type(position) is not int and position not in ("mean", "max", "last") and not callable(position):
        raise OptionError(f"position is {position!r}; it must be 'mean', 'max', 'last', a number, or a function.")
    if not pictures:
        raise OptionError("There is no picture to read from; give at least one.")
    if known.when != "step":  # of what comes before the answer begins, one step of it is enough
        options = f.options(num_beams=1, num_return_sequences=1, max_new_tokens=1, min_new_tokens=0)
    progress, rows = Progress(len(pictures)), []
    for number, picture in enumerate(pictures, 1):
        with trace(f, f"={name}") as t:
            if known.when == "picture":
                if isinstance(picture, EncodedImage):
                    raise OptionError(
                        f"{name} is inside the vision tower, which an encoded picture has passed already."
                    )
                f.encode_image(picture)
            else:
                f.run(task, picture, text, options=options)
        rows.append(_pool(t.along_answer(name) if "K" in known.own_shape else t[name], known, position))
        progress.show(number)
    progress.close()
    if len({len(row) for row in rows}) > 1:
        raise OptionError(
            f"{name} pooled by {position!r} has {sorted({len(row) for row in rows})} numbers in different pictures; "
            "a probe needs as many in each."
        )
    return torch.stack(rows)


def make_probe(
    features: Tensor,
    y: Tensor,
    classes: tuple[str, ...] | None,
    train: Sequence[int],
    held_out: Sequence[int],
    ridge: float,
    what: tuple[str, str, TaskText, Position, GenerationOptions | None],
) -> Probe:
    """Fit and measure on features (pictures, F) and targets: (pictures, columns) numbers, or (pictures,) classes."""
    x, rows, rest = features.double(), list(train), list(held_out)
    mean, deviation = x[rows].mean(dim=0), x[rows].std(dim=0, correction=0)
    scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    z = (x - mean) / scale
    fit = _fit_classes if classes is not None else _fit_numbers
    inner, constant = fit(z[rows], y[rows], ridge, len(classes or ()))
    weight = inner / scale[:, None]
    bias = constant - mean @ weight
    out = x @ weight + bias
    scores = _scores(out[rest], y[rest], classes)
    guess = _guess(y[rows], classes).expand_as(out[rest])
    return Probe(
        *what,
        ridge=ridge,
        classes=classes,
        train=tuple(rows),
        held_out=tuple(rest),
        score=sum(scores) / len(scores),
        scores=tuple(scores),
        train_score=_mean(_scores(out[rows], y[rows], classes)),
        baseline=_mean(_scores(guess, y[rest], classes)),
        weight=weight,
        bias=bias,
    )


def _fit_numbers(z: Tensor, y: Tensor, ridge: float, _: int) -> tuple[Tensor, Tensor]:
    """Ridge regression of y (n, columns) on z (n, F): its weights, and the constant. Through the smaller of the two
    systems of equations, n or F wide."""
    constant = y.mean(dim=0)
    n, width = z.shape
    penalty = max(ridge, 1e-8)  # features that depend on each other would have no solution without any
    if width <= n:
        gram = z.T @ z + penalty * torch.eye(width, dtype=z.dtype)
        return torch.linalg.solve(gram, z.T @ (y - constant)), constant
    gram = z @ z.T + penalty * torch.eye(n, dtype=z.dtype)
    return z.T @ torch.linalg.solve(gram, y - constant), constant


def _fit_classes(z: Tensor, y: Tensor, ridge: float, classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression of the classes y (n,): convex, so where it starts does not matter."""
    weight = torch.zeros(z.shape[1], classes, dtype=z.dtype, requires_grad=True)
    constant = torch.zeros(classes, dtype=z.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, constant], max_iter=200, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ weight + constant, y) + 0.5 * ridge * weight.square().sum() / len(z)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), constant.detach()


def _scores(out: Tensor, y: Tensor, classes: tuple[str, ...] | None) -> list[float]:
    """The share of classes that is right, or R2 of each column."""
    if classes is not None:
        return [float((out.argmax(dim=1) == y).double().mean())]
    rest, spread = (out - y).square().sum(dim=0), (y - y.mean(dim=0)).square().sum(dim=0)
    if not spread.all():
        raise OptionError("The targets of the pictures held out are all equal, so R2 is not defined; hold out more.")
    return [float(value) for value in 1 - rest / spread]


def _guess(y: Tensor, classes: tuple[str, ...] | None) -> Tensor:
    if classes is None:
        return y.mean(dim=0)
    return F.one_hot(torch.bincount(y, minlength=len(classes)).argmax(), len(classes)).double()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pool(value: Tensor, known: Name, position: Position) -> Tensor:
    """A value of one picture -> a row: positions pooled, heads and channels side by side."""
    if not isinstance(position, str | int):
        return position(value).detach().flatten().double().cpu()
    letters = [letter for letter in known.own_shape if letter != "K"]
    # the last dimension is never pooled: what attention looks at is not where it stands
    places = [dim for dim, letter in enumerate(letters[:-1]) if letter in _PLACES]
    others = [dim for dim in range(value.dim()) if dim not in places]
    flat = value.detach().double().cpu().permute(*places, *others).reshape(-1, *(value.shape[dim] for dim in others))
    if position == "mean":
        return flat.mean(dim=0).flatten()
    if position == "max":
        return flat.amax(dim=0).flatten()
    at = len(flat) - 1 if position == "last" else int(position)
    if not 0 <= at < len(flat):
        raise OptionError(f"{known.name} has the positions 0 to {len(flat) - 1} here, so there is no position {at}.")
    return flat[at].flatten()


def _find_name(f: Florence2, name: str) -> Name:
    known = {found.name: found for found in names_of(f.model.config) if not found.searched}
    select([name], list(known.values()), exactly=True)
    if name not in known:
        raise OptionError(f"{name!r} is a pattern; a probe reads one name.")
    return known[name]


def _listed(pictures: "Sequence[Picture] | str | os.PathLike[str]") -> tuple[list[Picture], list[Path]]:
    """The pictures; of a folder also their files."""
    if not isinstance(pictures, str | os.PathLike):
        return list(pictures), []
    if not Path(pictures).is_dir():
        raise OptionError(f"{os.fspath(pictures)!r} is no folder; give a folder, or a list of pictures.")
    files = [Path(str(source.data)) for source in find_pictures([os.fspath(pictures)])]
    return list(files), files


def _in_order(
    targets: Sequence[Target] | Mapping[str, Target], pictures: Sequence[Picture], files: Sequence[Path]
) -> list[Target]:
    if isinstance(targets, Mapping):
        if not files:
            raise OptionError("Targets by file name go with a folder of pictures; give a list, one for each picture.")
        missing = [file.name for file in files if file.name not in targets]
        if missing:
            raise OptionError(
                f"There is no target for {missing[0]} and {len(missing) - 1} more pictures of the folder."
            )
        return [targets[file.name] for file in files]
    if len(targets) != len(pictures):
        raise OptionError(f"There are {len(pictures)} pictures and {len(targets)} targets; give one for each.")
    return list(targets)


def _encode_targets(targets: Iterable[Target]) -> tuple[tuple[str, ...] | None, Tensor]:
    """(the classes, or None; numbers (n, columns), or classes (n,))."""
    given = list(targets)
    if any(isinstance(target, str) for target in given):
        counts = Counter(str(target) for target in given)
        if len(counts) < 2 or not all(isinstance(target, str) for target in given):
            raise OptionError(
                f"Targets of classes must be texts, and not all the same; got {given[0]!r}, {given[-1]!r}."
            )
        classes = tuple(sorted(counts))
        return classes, torch.tensor([classes.index(str(target)) for target in given])
    try:
        y = torch.tensor(given, dtype=torch.float64)
    except (TypeError, ValueError):
        raise OptionError("Targets must be all texts, all numbers, or rows of numbers of one length.") from None
    y = y[:, None] if y.dim() == 1 else y
    if y.dim() != 2 or not y.isfinite().all():
        raise OptionError("Targets must be finite numbers, or rows of them.")
    return None, y


def _check_settings(count: int, ridge: float, held_out: float) -> None:
    if not isinstance(ridge, Real) or not 0 <= ridge < math.inf:
        raise OptionError(f"ridge is {ridge!r}; it must be a number of 0 or more.")
    if not isinstance(held_out, Real) or not 0 < held_out < 1:
        raise OptionError(f"held_out is {held_out}; it must be a share between 0 and 1.")
    if count < _LEAST:
        raise OptionError(f"A probe needs at least {_LEAST} pictures, not {count}.")


def _split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Which to train on and which to hold out, at least two of each."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(max(2, round(count * share)), count - 2)
    return sorted(order[held:]), sorted(order[:held])
