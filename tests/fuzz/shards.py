"""Shards of the store of image features with spoilt bytes: a grid comes back to the bit, or not at all."""

from pathlib import Path
from random import Random
from typing import TypeAlias

import torch
from torch import Tensor

from florence2.errors import CheckpointError
from florence2.train.store.grids import GridStore
from tests.fuzz import values
from tests.fuzz.worker import expect

Spoil: TypeAlias = tuple[str, int, int]
"""What happens to a shard, which one, and a seed."""

_TOWER = "0" * 32
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = ("bytes", "bytes", "bytes", "cut", "empty", "vanish", "swap", "tower", "folder")


def draw(random: Random) -> tuple[list[int], int, list[Spoil], bool]:
    """(grids of each shard, their type, what is spoilt, whether the store is opened before that)."""
    shards = [random.randrange(1, 4) for _ in range(random.randrange(1, 4))]
    spoils = [
        (random.choice(_KINDS), random.randrange(3), random.randrange(1 << 30)) for _ in range(random.randrange(4))
    ]
    return shards, random.randrange(len(_TYPES)), spoils, random.random() < 0.5


def check(case: tuple[list[int], int, list[Spoil], bool], place: Path) -> None:
    shards, kind, spoils, early = case
    written, paths = _write(place, shards, _TYPES[kind])
    store = GridStore(place, _TOWER)
    before = [path.read_bytes() for path in paths]
    for what, which, seed in spoils:
        _spoil(what, paths, which % len(paths), Random(seed))
    unharmed = {paths[i] for i, content in enumerate(before) if paths[i].is_file() and paths[i].read_bytes() == content}
    if not early:
        store.refresh()
    damaged = store.find_damaged(written)
    expect(not unharmed & set(damaged), "a whole shard counts as damaged")
    for key, grid in written.items():
        held = store._places[key][0] if key in store else None
        try:
            found = store.read(key) if held is not None else None
        except CheckpointError:
            expect(held in damaged and not (held or place).is_file(), "a shard that was refused is still there")
            continue
        if found is None:
            expect(not any(key in _keys(path) for path in unharmed), "a grid of a whole shard was not found")
        else:
            expect(found.dtype == grid.dtype and torch.equal(found, grid), "a grid is another than was written")


def _write(place: Path, shards: list[int], dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Path]]:
    """Write the grids; return them by key, and the shards in the order of writing."""
    store, written, paths = GridStore(place, _TOWER), dict[str, Tensor](), list[Path]()
    for count in shards:
        first = len(written)
        some = {f"{number:032x}": _grid(number).to(dtype) for number in range(first, first + count)}
        store.write(some)
        store.refresh()
        written |= some
        paths.append(store._places[f"{first:032x}"][0])
    return written, paths


def _grid(number: int) -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(number))


def _keys(path: Path) -> set[str]:
    """The keys in a whole shard."""
    store = GridStore(path.parent.parent, path.parent.name)
    return {key for key, (held, _) in store._places.items() if held == path}


def _spoil(what: str, paths: list[Path], which: int, random: Random) -> None:
    """Change a shard as a disk, a full one, or a user with two folders might."""
    path = paths[which]
    if not path.is_file():
        return
    content = path.read_bytes()
    if what == "bytes":
        path.write_bytes(values.change_bytes(random, content, random.choice((200, len(content) or 1))))
    elif what in ("cut", "empty"):
        path.write_bytes(content[: random.randrange(len(content) + 1) if what == "cut" else 0])
    elif what == "vanish":
        path.unlink()
    elif what == "swap":
        other = random.choice(paths)
        path.write_bytes(other.read_bytes() if other.is_file() else b"")
    elif what == "folder":
        path.unlink()
        path.mkdir()
    else:  # the same values, written for another tower
        foreign = GridStore(path.parent.parent, "1" * 32)
        foreign.write({next(iter(_keys(path)), "0" * 32): _grid(0)})
        path.write_bytes(next(foreign.folder.iterdir()).read_bytes())
