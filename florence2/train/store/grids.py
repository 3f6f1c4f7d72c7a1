"""Grids (h, w, C) on disk: safetensors shards of a bounded size, each written whole and never changed.

A tensor's name is the key of its image and a checksum over vision tower, type, shape and values. So damage, and a shard
of another tower, are noticed when a grid is read.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from florence2.checkpoints.files import cannot_write
from florence2.checkpoints.tensors import WeightFiles, write_safetensors
from florence2.errors import CheckpointError, OutputError

SHARD_BYTES = 64 << 20
"""The most bytes of values in a shard, unless a single grid is larger. A kill loses one shard at most."""
_SUFFIX = ".safetensors"
_NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{8})")


class GridStore:
    """The grids of one vision tower in a folder, by the keys of their images.

    Attributes:
        folder: The folder of this tower, inside the one that towers share.
        tower: The digest of the tower, see `FrozenTower.digest`.
    """

    def __init__(self, folder: Path, tower: str):
        """Open the grids of `tower` below `folder`, which need not exist."""
        self.folder, self.tower = folder / tower, tower
        self._places: dict[str, tuple[Path, str]] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> list[Path]:
        """Read again which grids the folder has; return the shards that cannot be read."""
        self._places, damaged = {}, []
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            names = _names(path)
            damaged += [] if names else [path]
            self._places |= {name.partition(".")[0]: (path, name) for name in names}
        return damaged

    def read(self, key: str) -> Tensor:
        """Return the grid of an image.

        Raises CheckpointError for a damaged or foreign one, whose shard is then removed.
        """
        grid = self._read(key)
        if grid is None:
            path = self.remove([self._places[key][0]])[0]
            raise CheckpointError(
                f"{path} was damaged, or holds features of another model, and was removed. Give the same command "
                "again: its images are encoded again."
            )
        return grid

    def find_damaged(self, keys: Iterable[str]) -> list[Path]:
        """Read the grids of `keys`, as far as they are here; return the shards with one that is damaged or foreign."""
        return sorted({self._places[key][0] for key in keys if key in self and self._read(key) is None})

    def remove(self, shards: list[Path]) -> list[Path]:
        """Remove shards, and return them."""
        for path in shards:
            with suppress(OSError):
                path.unlink()
        return shards

    def write(self, grids: Mapping[str, Tensor]) -> None:
        """Write a shard with the grids of some images by key. Raises OutputError when it cannot be written."""
        named = {f"{key}.{_checksum(self.tower, grid):08x}": grid.contiguous() for key, grid in grids.items()}
        name = hashlib.sha256("".join(named).encode()).hexdigest()[:16]
        path = self.folder / f"{name}{_SUFFIX}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error.strerror or str(error)) from None
        write_safetensors(path, named)

    def _read(self, key: str) -> Tensor | None:
        """Return a grid, or None if its values are not those that were written for this tower."""
        path, name = self._places[key]
        try:
            grid = next(WeightFiles((path,), pickled=False).read_named([name])).clone()
        except (CheckpointError, SafetensorError):
            return None
        return grid if f"{_checksum(self.tower, grid):08x}" == name.partition(".")[2] else None


class ShardWriter:
    """Collects grids and writes a shard whenever one is full. The end of its `with` block writes the rest."""

    def __init__(self, store: GridStore):
        self._store = store
        self._waiting: dict[str, Tensor] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()  # also after Ctrl-C or an error, so that the next run has what this one has computed

    def add(self, key: str, grid: Tensor) -> None:
        """Take a grid (h, w, C). Raises OutputError where those before it cannot be written."""
        if self._waiting and sum(each.nbytes for each in self._waiting.values()) + grid.nbytes > SHARD_BYTES:
            self._flush()
        self._waiting[key] = grid

    def _flush(self) -> None:
        if not self._waiting:
            return
        try:
            self._store.write(self._waiting)
        except OutputError:
            self._waiting = {}  # trying again would fail again
            raise
        self._waiting = {}  # not before: Ctrl-C may come while they are written


def _names(path: Path) -> list[str]:
    """Return the names of the tensors in a shard; none if it cannot be read or has a name of another form."""
    try:
        names = list(WeightFiles((path,), pickled=False).read_headers())
    except CheckpointError:
        return []
    return names if all(map(_NAME.fullmatch, names)) else []


def _checksum(tower: str, grid: Tensor) -> int:
    start = zlib.crc32(f"{tower} {grid.dtype} {tuple(grid.shape)}".encode())
    return zlib.crc32(grid.contiguous().view(-1).view(torch.uint8).numpy().data, start)
