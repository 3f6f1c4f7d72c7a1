"""Images of an evaluation, encoded through a store: what a run or an earlier evaluation has computed is read."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from florence2.asking.requests import EncodedImage, kept_source
from florence2.checkpoints.files import cannot_write
from florence2.errors import Florence2Error, OutputError
from florence2.inputs.image import ImageInput
from florence2.pipeline import Florence2
from florence2.train.images import upright_size
from florence2.train.samples import Sample, Samples
from florence2.train.store.filling import StoreOptions, check_room, check_tower
from florence2.train.store.grids import GridStore, ShardWriter
from florence2.train.store.keys import ImageKeys
from florence2.train.store.tower import FrozenTower


class StoredImages:
    """Encodes images for `f`: the vision tower's output is read from a store, or computed and put there."""

    def __init__(self, f: Florence2, options: StoreOptions):
        """Open the store for the vision tower of `f`. Raises OutputError where its folder cannot be made."""
        self._f, self._options = f, options
        self._tower = FrozenTower(f.model, f.processor, at_once=1)
        self._keys = ImageKeys(f.processor)
        try:
            options.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(options.folder, error.strerror or str(error)) from None
        self._store = GridStore(options.folder, self._tower.digest)

    def encode_all(self, samples: Samples) -> Iterator[tuple[Sample, EncodedImage | Florence2Error]]:
        """Yield each sample with its encoded image, or why it has none.

        Raises OptionError where the disk has no room for those that are not stored, and ConfigError where code of the
        vision tower has changed.
        """
        self._check(samples)
        # a full disk costs the next evaluation its time, but not this one its answers
        with suppress(OutputError), ShardWriter(self._store) as writer:
            for sample in (samples[i] for i in range(len(samples))):
                yield sample, self._encode(sample.image, writer)

    def _check(self, samples: Samples) -> None:
        """Check that the missing grids have room, and that the model computes the stored ones."""
        self._store.refresh()
        images: dict[str, ImageInput] = {}
        for sample in (samples[i] for i in range(len(samples))):
            with suppress(Florence2Error):  # reported with its questions
                images.setdefault(self._keys(sample.image), sample.image)
        stored = next((key for key in images if key in self._store), None)
        if stored is not None:
            check_tower(self._store, self._tower, stored, self._f.processor.image(images[stored]))
        missing = sum(key not in self._store for key in images)
        check_room(len(images), missing, self._tower.grid_bytes, self._options)

    def _encode(self, image: ImageInput, writer: ShardWriter) -> EncodedImage | Florence2Error:
        try:
            return self._read_or_compute(image, writer)
        except Florence2Error as error:
            return error

    @torch.no_grad()
    def _read_or_compute(self, image: ImageInput, writer: ShardWriter) -> EncodedImage:
        key, model = self._keys(image), self._f.model
        if key in self._store:
            grid, size = self._store.read(key), self._size(image)
        else:
            grid, size = self._compute(image)
            with suppress(OutputError):
                writer.add(key, grid)
        features: Tensor = model.multi_modal_projector(grid[None].to(model.device, model.dtype))  # (1, N, D)
        return EncodedImage(features, size, kept_source(image))

    def _compute(self, image: ImageInput) -> tuple[Tensor, tuple[int, int]]:
        prepared = self._f.prepare_image(image)
        return self._tower.encode(self._f.pixel_values([prepared]))[0].clone(), prepared.size

    def _size(self, image: ImageInput) -> tuple[int, int]:
        """Return (width, height) of the upright image, from its header where that suffices."""
        if isinstance(image, os.PathLike):
            return upright_size(Path(image))
        return self._f.processor.open_image(image).size
