"""Files written whole or not at all."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from florence2.checkpoints.files import find_weight_files, new_files, write_json, written_whole
from florence2.errors import CheckpointError


def test_half_written_files_never_appear(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    with pytest.raises(RuntimeError), written_whole(target) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with written_whole(target) as draft:
        draft.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"] and target.stat().st_mode & 0o600 == 0o600


@pytest.mark.parametrize("name", ["missing.safetensors", "x" * 256, "é" * 128, "a\0b"])
def test_shards_that_cannot_exist(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="lists shards that do not exist"):
        find_weight_files(index)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_the_longest_name_of_a_shard(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    (tmp_path / name).touch()
    assert find_weight_files(index) == ((tmp_path / name,), False)


@pytest.mark.parametrize("existed", [True, False])
def test_a_folder_that_could_not_be_filled_is_as_before(existed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoint"
    if existed:
        folder.mkdir(parents=True)
        (folder / "notes.txt").touch()
    with pytest.raises(KeyboardInterrupt), new_files(folder):
        (folder / "config.json").touch()
        raise KeyboardInterrupt
    assert folder.exists() == existed and (not existed or [path.name for path in folder.iterdir()] == ["notes.txt"])


@pytest.fixture
def group_reads() -> Iterator[None]:
    """New files may be read by the owner's group and nobody else."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def permissions(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_permissions_follow_the_umask(tmp_path: Path, group_reads: None) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    assert permissions(tmp_path / "a.json") == 0o640
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_permissions_follow_the_umask_whatever_wrote_the_file(tmp_path: Path, group_reads: None) -> None:
    """Some writers put a file of their own, for the owner alone, in the place of the one they were given."""
    with written_whole(tmp_path / "private") as draft:
        draft.unlink()
        draft.touch(mode=0o600)
    assert permissions(tmp_path / "private") == 0o640
