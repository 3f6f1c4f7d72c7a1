"""The images and targets that a probe is fitted on."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from florence2.bulk.sources import find_images
from florence2.errors import OptionError
from florence2.pipeline import AnyImage

Target: TypeAlias = "str | float | Sequence[float]"
Images: TypeAlias = "Sequence[AnyImage] | str | os.PathLike[str]"
"""A list of images, or a folder."""


def list_images(images: Images) -> tuple[list[AnyImage], list[Path]]:
    """Return the images, and for a folder also their files. Raises OptionError when the folder does not exist."""
    if not isinstance(images, str | os.PathLike):
        return list(images), []
    if not Path(images).is_dir():
        raise OptionError(f"{os.fspath(images)!r} is not a folder; give a folder, or a list of images.")
    files = [Path(str(source.data)) for source in find_images([os.fspath(images)])]
    return list(files), files


def order_targets(
    targets: Sequence[Target] | Mapping[str, Target], images: Sequence[AnyImage], files: Sequence[Path]
) -> list[Target]:
    """Return one target for each image, in their order. Raises OptionError when they do not match."""
    if isinstance(targets, Mapping):
        if not files:
            raise OptionError("Targets by file name need a folder of images; give a list, one for each image.")
        missing = [file.name for file in files if file.name not in targets]
        if missing:
            raise OptionError(f"No target for {len(missing)} of the folder's images, the first of them {missing[0]}.")
        return [targets[file.name] for file in files]
    if len(targets) != len(images):
        raise OptionError(f"Got {len(images)} images and {len(targets)} targets; give one target for each image.")
    return list(targets)


def encode_targets(targets: Iterable[Target]) -> tuple[tuple[str, ...] | None, Tensor]:
    """Return (the classes or None; numbers (n, columns) or classes (n,)). Raises OptionError for mixed targets."""
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
