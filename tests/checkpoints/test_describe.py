"""What a checkpoint is said to hold."""

from pathlib import Path

import pytest

from florence2.checkpoints.checkpoint import load_model
from florence2.checkpoints.describe import describe_checkpoint
from florence2.checkpoints.files import hash_file
from tests.conftest import copy_checkpoint, keep_only


def test_description(small_folder: Path, native_folder: Path) -> None:
    described = describe_checkpoint(small_folder)
    model = load_model(small_folder)
    assert described["layout"] == "microsoft" and described["dtypes"].keys() == {"float32"}
    assert described["parameters"]["total"] == sum(t.numel() for t in model.state_dict().values())
    vision = sum(p.numel() for p in model.vision_tower.parameters())
    assert described["parameters"]["vision_tower"] == vision
    assert described["files"][0]["sha256"] == hash_file(small_folder / "model.safetensors")
    assert describe_checkpoint(native_folder)["layout"] == "native"
    assert describe_checkpoint(native_folder)["vocab_size"] == 51328


@pytest.mark.parametrize("stored", [("shared", "lm_head"), ("encoder", "decoder"), ("lm_head",)])
def test_the_tied_embedding_counts_once(small_folder: Path, tmp_path: Path, stored: tuple[str, ...]) -> None:
    copy_checkpoint(small_folder, tmp_path / "c", keep_only(*stored))
    described, whole = describe_checkpoint(tmp_path / "c"), describe_checkpoint(small_folder)
    assert described["parameters"] == whole["parameters"] and described["dtypes"] == whole["dtypes"]


def test_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert hash_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
