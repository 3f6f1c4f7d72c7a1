"""Untrained checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import florence2
from florence2.checkpoints.hub import resolve
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


@pytest.mark.release
def test_the_vocabulary_follows_the_tokenizer(native_folder: Path, tmp_path: Path) -> None:
    """nano's has 1,631 tokens; the native layout's has a placeholder that Microsoft's layout does not know."""
    for name, source, tokens in (("nano", resolve("nano"), 1631), ("native", native_folder, 51289)):
        init_checkpoint(tmp_path / name, preset("tiny"), source)
        f = florence2.load(tmp_path / name)
        assert f.model.config.text.vocab_size == tokens == f.processor.tokenizer.vocab_size
        assert f.run("<CAPTION>", Image.new("RGB", (64, 64)), max_new_tokens=3).token_ids


def test_special_ids_follow_the_tokenizer(tmp_path: Path) -> None:
    """A tokenizer in which `<s>` and `<pad>` have changed places is not that of nano, but one can train with it."""
    source = tmp_path / "source"
    shutil.copytree(resolve("nano"), source)
    values = json.loads((source / "tokenizer.json").read_text())
    word = list(values["model"]["vocab"])[-1]
    values["model"]["merges"] = [pair for pair in values["model"]["merges"] if "".join(pair) != word]
    del values["model"]["vocab"][word]
    values["added_tokens"] = [*values["added_tokens"][:4], {"id": 605, "content": "<mask>"}]
    values["model"]["vocab"] |= {"<s>": 1, "<pad>": 0}
    for token, id in ((values["added_tokens"][0], 1), (values["added_tokens"][1], 0)):
        token["id"] = id
    values["post_processor"]["cls"] = ["<s>", 1]
    (source / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="1630 tokens, but the model 1631"):
        florence2.load(source)
    init_checkpoint(tmp_path / "new", preset("tiny"), source)
    f = florence2.load(tmp_path / "new")
    assert f.processor.encode("") == [1, 2] and f.options().forced_bos_token_id == 1
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    settings["text_config"]["bos_token_id"] = 0
    (tmp_path / "new" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="bos_token_id of 0, but the tokenizer gives <s> the id 1"):
        florence2.load(tmp_path / "new")


def test_what_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(resolve("nano"), source)
    settings = json.loads((source / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 4096, "width": 4096}
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="128 x 128 positions, but the model knows 1 x 1 to 50 x 50"):
        init_checkpoint(tmp_path / "new", preset("tiny"), source)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        init_checkpoint(tmp_path / "new", preset("tiny"), source)
    assert not (tmp_path / "new").exists()
