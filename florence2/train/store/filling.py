"""Encode the images that a run needs and the store does not have yet, and hand out the stored ones."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from florence2.errors import CheckpointError, ConfigError, Florence2Error, ImageError, OptionError
from florence2.inputs.image import ImageInput
from florence2.processor import Processor
from florence2.train.data import naming
from florence2.train.loader import load_ahead
from florence2.train.samples import Samples
from florence2.train.store.grids import GridStore, ShardWriter
from florence2.train.store.keys import ImageKeys
from florence2.train.store.tower import FrozenTower

DEFAULT_LIMIT = 50.0
"""Gigabytes that a store may take where nobody says it: base's grids of 21,000 images in float32."""
_GB = 10**9
_Waiting: TypeAlias = tuple[str, int]
"""The key of an image to encode, and the number of a sample that has it."""
_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.05}
"""By how much of its norm a grid may differ from a stored one: what another routine or device rounds otherwise."""


@dataclass(frozen=True)
class StoreOptions:
    """Where the outputs of a frozen vision tower are kept, and the gigabytes that everything there may take."""

    folder: Path
    limit: float = DEFAULT_LIMIT

    def __post_init__(self) -> None:
        """Raise OptionError for a limit that is not positive."""
        if not self.limit > 0:
            raise OptionError(f"The limit of the store is {self.limit} GB; it must be above 0.")


class StoredGrids:
    """Returns the stored grid (h, w, C) of an image; worker processes get a copy."""

    def __init__(self, store: GridStore, keys: ImageKeys):
        self.store, self.keys = store, keys

    def __call__(self, image: ImageInput) -> Tensor:
        """Read the grid. Raises ImageError where the image is not the one that was encoded."""
        key = self.keys(image)
        if key not in self.store:
            raise ImageError(
                "The image has changed since it was encoded. Give the same command again, which encodes it again."
            )
        return self.store.read(key)


def fill_store(
    grids: StoredGrids,
    tower: FrozenTower,
    processor: Processor,
    samples: Samples,
    needed: Iterable[int],
    options: StoreOptions,
    *,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    agree: Callable[[Any], Any] = lambda value: value,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Encode the images of some samples that the store lacks. Whoever calls it holds the lock of the store's folder.

    Ctrl-C and errors lose nothing that was encoded, and the next call encodes the rest, to the same bits.

    Args:
        grids: The store and the keys of the images.
        tower: Computes the grids.
        processor: Reads the images.
        samples: The data.
        needed: The numbers of the samples whose images are needed.
        options: The limit of the disk space.
        workers: Processes that read images.
        share: (rank, processes): each process encodes its share.
        agree: Returns in every process what the first one gave, when all have called it.
        say: Gets sentences on the images that are stored and those to come, in the first process.
        progress: Called as `progress(done, total)` after each image of this share.

    Raises:
        ImageError: An image cannot be read.
        OptionError: The grids need more disk space than the limit, or than is free, and nothing was written; or the
            processes do not share the folder.
        ConfigError: The tower's code has changed, or its output is not finite.
        OutputError: A shard cannot be written.
    """
    rank, processes = share
    plan: list[_Waiting] | Florence2Error = []
    if rank == 0:  # it alone reads every file, so that all have one plan
        try:
            plan = _plan(grids, tower, processor, samples, needed, options, say)
        except Florence2Error as error:
            plan = error
    plan, grids.keys.known = agree((plan, grids.keys.known))
    if isinstance(plan, Florence2Error):
        raise plan
    chunks = _Chunks(samples, plan[rank::processes], tower.at_once, grids.keys, processor)
    _encode(chunks, grids.store, tower, workers, progress)
    agree(None)  # until every process has written its share
    grids.store.refresh()
    if not all(key in grids.store for key, _ in plan):
        raise OptionError(
            f"{grids.store.folder} lacks features that another process has written: all machines of a run must share "
            "this folder. Give another --store."
        )


def _plan(
    grids: StoredGrids,
    tower: FrozenTower,
    processor: Processor,
    samples: Samples,
    needed: Iterable[int],
    options: StoreOptions,
    say: Callable[[str], None],
) -> list[_Waiting]:
    """Return the images to encode, after checks of the stored ones and of the room for more."""
    store = grids.store
    numbers: dict[str, int] = {}
    for number in needed:
        sample = samples[number]
        with naming(sample):
            numbers.setdefault(grids.keys(sample.image), number)
    _remove_damaged(store, numbers, say)
    stored = next((key for key in numbers if key in store), None)
    if stored is not None:
        check_tower(store, tower, stored, processor.image(samples[numbers[stored]].image))
    missing = [(key, number) for key, number in numbers.items() if key not in store]
    check_room(len(numbers), len(missing), tower.grid_bytes, options)
    say(_describe(len(numbers), len(missing), tower.grid_bytes, options.folder))
    return missing


def _remove_damaged(store: GridStore, needed: Iterable[str], say: Callable[[str], None]) -> None:
    """Remove the shards that cannot be read or are not those of this tower."""
    damaged = store.refresh()
    for path in store.remove([*damaged, *store.find_damaged(needed)]):
        say(f"{path} was damaged, or holds features of another model, and was removed; its images are encoded again.")
    store.refresh()


def check_tower(store: GridStore, tower: FrozenTower, key: str, pixel_values: Tensor) -> None:
    """Compare the stored grid of an image with the one that `tower` computes from its pixel values (1, 3, H, W).

    Raises ConfigError where they differ: a digest cannot see changed code, such as a hook.
    """
    stored, computed = store.read(key).float(), tower.encode(pixel_values)[0].float()
    apart = float((computed - stored).norm() / stored.norm().clamp(min=1e-30))
    if not apart <= _TOLERANCE.get(tower.dtype, 0.01):
        raise ConfigError(
            f"{store.folder} holds features of another vision tower: those of one image differ by {apart:.0%} from "
            "those that this model computes, so its code has changed. Remove this folder, or give another --store."
        )


def check_room(needed: int, missing: int, each: int, options: StoreOptions) -> None:
    """Raise OptionError where the grids to come would exceed the limit or the disk."""
    if not missing:
        return
    held = sum(path.stat().st_size for path in options.folder.rglob("*.safetensors"))
    more, free = missing * each, shutil.disk_usage(options.folder).free
    problem = None
    if held + more > options.limit * _GB:
        problem = f"with {_size(held)} already there more than the limit of {options.limit:g} GB (--store-limit)"
    elif more > free:
        problem = f"and the disk has {_size(free)} free"
    if problem:
        raise OptionError(
            f"The features of {missing:,} of {needed:,} images need {_size(more)} in {options.folder}, {problem}. "
            "Raise the limit, give another folder with --store, or go without one: `train` has --no-store for that."
        )


def _describe(needed: int, missing: int, each: int, folder: Path) -> str:
    if not missing:
        return f"The features of all {needed:,} images are in {folder}; no image is encoded."
    return (
        f"The vision tower is frozen, so each of {needed:,} images is encoded once. {needed - missing:,} are in "
        f"{folder}; the others need {_size(missing * each)} there."
    )


def _size(count: int) -> str:
    return f"{count / _GB:.1f} GB" if count >= _GB else f"{count / 10**6:.1f} MB"


class _Chunks(Dataset[tuple[list[str], Tensor]]):
    """The keys and the pixel values (B, 3, H, W) of `size` images at a time."""

    def __init__(self, samples: Samples, images: Sequence[_Waiting], size: int, keys: ImageKeys, processor: Processor):
        self.samples, self.images, self.size, self.keys, self.processor = samples, images, size, keys, processor

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __getitem__(self, index: int) -> tuple[list[str], Tensor]:
        chosen = self.images[index * self.size : (index + 1) * self.size]
        return [key for key, _ in chosen], torch.cat([self._read(*image) for image in chosen])

    def _read(self, key: str, number: int) -> Tensor:
        sample = self.samples[number]
        with naming(sample):
            pixels = self.processor.image(sample.image)
            if self.keys(sample.image) != key:
                raise ImageError("The image was changed while the run read it; give the same command again.")
        return pixels


def _encode(
    chunks: _Chunks, store: GridStore, tower: FrozenTower, workers: int, progress: Callable[[int, int], None]
) -> None:
    """Encode images and write their grids."""
    done = 0
    with ShardWriter(store) as writer:
        for keys, pixels in load_ahead(chunks, range(len(chunks)), min(workers, len(chunks))):
            for key, grid in zip(keys, tower.encode(pixels), strict=True):
                if not torch.isfinite(grid).all():
                    raise CheckpointError("The vision tower gives values that are not finite; its weights are damaged.")
                writer.add(key, grid.clone())
            done += len(keys)
            progress(done, len(chunks.images))
