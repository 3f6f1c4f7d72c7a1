"""Untrained checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import florence2
from florence2.checkpoints.presets import init_checkpoint, preset
from florence2.errors import CheckpointError


def test_init(small_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        init_checkpoint(tmp_path / name, preset("tiny"), small_folder, seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a) and not torch.equal(
        a["image_projection"], c["image_projection"]
    )
    assert {tensor.dtype for tensor in a.values()} == {torch.float16}
    assert float(a["image_projection"].float().std()) == pytest.approx(0.02, rel=0.05)
    assert (a["image_proj_norm.weight"] == 1).all() and (a["image_proj_norm.bias"] == 0).all()
    f = florence2.load(tmp_path / "a")
    assert f.model.config == preset("tiny") and f.processor.image_config.height == 160


def test_init_refuses_to_overwrite_and_needs_a_tokenizer(small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        init_checkpoint(small_folder, preset("tiny"), small_folder)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        init_checkpoint(tmp_path / "new", preset("tiny"), tmp_path)
