"""Shards: what is written comes back, and nothing else does."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from florence2.checkpoints import tensors
from florence2.checkpoints.tensors import write_safetensors
from florence2.errors import CheckpointError, OutputError
from florence2.train.store import grids
from florence2.train.store.grids import GridStore, ShardWriter
from tests.full_disk import files_of_at_most

TOWER = "0" * 32


def key(number: int) -> str:
    return f"{number:032x}"


def grid(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(number)).to(dtype)


def filled(folder: Path, count: int, tower: str = TOWER) -> GridStore:
    """A store with a shard for each of some grids."""
    store = GridStore(folder, tower)
    for number in range(count):
        store.write({key(number): grid(number)})
    store.refresh()
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_grid_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    GridStore(tmp_path, TOWER).write({key(n): grid(n, dtype) for n in range(3)})
    store = GridStore(tmp_path, TOWER)
    assert len(store) == 3 and key(2) in store and key(3) not in store
    for number in range(3):
        assert store.read(key(number)).dtype == dtype
        assert torch.equal(store.read(key(number)), grid(number, dtype))


def test_a_grid_is_read_without_the_headers_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of small grids has hundreds, and every image of every update is read."""
    store = filled(tmp_path, 2)
    monkeypatch.setattr(tensors, "_safetensors_headers", lambda path: pytest.fail(f"{path} is read as a whole"))
    assert torch.equal(store.read(key(1)), grid(1))


def test_a_shard_without_the_grid_is_damaged(tmp_path: Path) -> None:
    """It was replaced since the store was opened."""
    store = filled(tmp_path, 2)
    path, _ = store._places[key(1)]
    path.write_bytes(store._places[key(0)][0].read_bytes())
    assert store.find_damaged([key(0), key(1)]) == [path]


def test_towers_do_not_share_grids(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    assert len(GridStore(tmp_path, "1" * 32)) == 0


def test_a_shard_that_is_cut_short_is_reported_and_not_used(tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    path, _ = store._places[key(1)]
    path.write_bytes(path.read_bytes()[:-1])
    assert store.refresh() == [path]
    assert key(1) not in store and key(0) in store and key(2) in store


@pytest.mark.parametrize("place", [-1, -100])
def test_a_changed_value_is_noticed(tmp_path: Path, place: int) -> None:
    """The shard is removed, so that the same command computes it again."""
    store = filled(tmp_path, 3)
    path, _ = store._places[key(1)]
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert store.refresh() == [] and store.find_damaged(map(key, range(9))) == [path]
    assert path.exists()
    with pytest.raises(CheckpointError, match="was damaged, or holds features of another model.*same command again"):
        store.read(key(1))
    assert not path.exists() and torch.equal(store.read(key(2)), grid(2))


def test_a_shard_of_another_tower_is_noticed(tmp_path: Path) -> None:
    other = filled(tmp_path, 1, tower="1" * 32)
    store = filled(tmp_path, 0)
    store.folder.mkdir()
    path, _ = other._places[key(0)]
    (store.folder / path.name).write_bytes(path.read_bytes())
    store.refresh()
    assert store.find_damaged([key(0)]) == [store.folder / path.name]
    with pytest.raises(CheckpointError, match="another model"):
        store.read(key(0))


def test_a_foreign_file_is_noticed(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    (store.folder / "x.safetensors").write_text("not a shard")
    write_safetensors(store.folder / "y.safetensors", {"weight": grid(0)})
    assert [path.name for path in store.refresh()] == ["x.safetensors", "y.safetensors"]
    assert len(store) == 1


def test_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "SHARD_BYTES", 2 * grid(0).nbytes)
    store = GridStore(tmp_path, TOWER)
    with ShardWriter(store) as writer:
        for number in range(5):
            writer.add(key(number), grid(number))
    store.refresh()
    shards = [path for path in store.folder.iterdir() if path.suffix == ".safetensors"]
    assert sorted(len(grids._names(path)) for path in shards) == [1, 2, 2] and len(store) == 5


def test_what_is_done_is_written_after_an_error(tmp_path: Path) -> None:
    store = GridStore(tmp_path, TOWER)
    with pytest.raises(KeyboardInterrupt), ShardWriter(store) as writer:
        writer.add(key(0), grid(0))
        raise KeyboardInterrupt
    store.refresh()
    assert torch.equal(store.read(key(0)), grid(0))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        GridStore(tmp_path / "file", TOWER).write({key(0): grid(0)})


def test_a_full_disk_is_one_sentence_and_leaves_no_part(tmp_path: Path) -> None:
    store = GridStore(tmp_path, TOWER)
    with files_of_at_most(100), pytest.raises(OutputError, match="cannot be written"), ShardWriter(store) as writer:
        writer.add(key(0), grid(0))
    assert not list(store.folder.iterdir())
