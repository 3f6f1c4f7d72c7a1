"""A disk that is full before a checkpoint is written: a sentence, and no file that could be taken for a whole one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import florence2
from florence2.checkpoints.checkpoint import convert_checkpoint
from florence2.checkpoints.hub import resolve
from florence2.checkpoints.presets import init_checkpoint, preset
from florence2.checkpoints.tensors import write_safetensors
from florence2.errors import OutputError
from tests.full_disk import files_of_at_most

WRITERS: dict[str, Callable[[Path], object]] = {
    "convert": lambda folder: convert_checkpoint(resolve("nano"), folder),
    "init": lambda folder: init_checkpoint(folder, preset("tiny"), resolve("nano")),
    "save": lambda folder: florence2.load("nano").save(folder),
}


@pytest.mark.parametrize("size", [1_000_000, 2_000])
@pytest.mark.parametrize("name", WRITERS)
def test_no_half_checkpoint_is_left(name: str, size: int, tmp_path: Path) -> None:
    """The weights do not fit, or what comes after them."""
    with files_of_at_most(size), pytest.raises(OutputError, match="cannot be written: .*Make room on the disk"):
        WRITERS[name](tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_files_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a")
    with files_of_at_most(1_000_000), pytest.raises(OutputError):
        convert_checkpoint(resolve("nano"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_tokenizer_may_be_what_no_longer_fits(tmp_path: Path) -> None:
    """After weights and configuration have been written."""
    source = tmp_path / "source"
    shutil.copytree(resolve("nano"), source)
    (source / "LICENSE").write_bytes(bytes(20_000_000))
    with files_of_at_most(15_000_000), pytest.raises(OutputError, match="LICENSE cannot be written"):
        convert_checkpoint(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_output_error_is_an_oserror_too(tmp_path: Path) -> None:
    with files_of_at_most(100), pytest.raises(OSError, match="cannot be written") as error:
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1000)})
    assert isinstance(error.value, florence2.Florence2Error) and error.value.strerror
    assert list(tmp_path.iterdir()) == []
