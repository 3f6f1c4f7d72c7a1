"""Loading a part of a model: only its tensors are read and held, as strictly as a whole model's."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from florence2.checkpoints import tensors
from florence2.checkpoints.adapters import merge_adapter
from florence2.checkpoints.checkpoint import load_model, save_checkpoint
from florence2.errors import CheckpointError, Florence2Error
from tests.checkpoints.test_checkpoint import split_into_shards
from tests.conftest import copy_checkpoint, keep_only

VISION = ("vision_tower", "image_proj", "image_pos_embed", "visual_temporal_embed")
SHARED, COPY = "language_model.model.shared.weight", "language_model.model.encoder.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors whose values are read from safetensors."""
    names: list[str] = []
    original = tensors._open_safetensors

    class Recorded:
        def __init__(self, path: Path):
            self.file: Any = original(path)

        def __enter__(self) -> "Recorded":
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_slice(self, name: str) -> Any:
            return self.file.get_slice(name)

        def get_tensor(self, name: str) -> Tensor:
            names.append(name)
            tensor: Tensor = self.file.get_tensor(name)
            return tensor

    monkeypatch.setattr(tensors, "_open_safetensors", Recorded)
    return names


def belongs(name: str, parts: str) -> bool:
    encoder = name.startswith("language_model.model.encoder.") or name == SHARED
    return name.startswith(VISION) or (parts == "encoder" and encoder)


@pytest.mark.parametrize("parts", ["vision", "encoder"])
@pytest.mark.parametrize("sharded", [False, True])
def test_only_the_part_is_read_and_held(
    small_folder: Path, tmp_path: Path, read: list[str], parts: Any, sharded: bool
) -> None:
    shutil.copytree(small_folder, tmp_path / "c")
    stored = load_file(small_folder / "model.safetensors")
    if sharded:
        split_into_shards(tmp_path / "c")
    model = load_model(tmp_path / "c", parts=parts)
    wanted = [name for name in stored if belongs(name, parts)]
    assert sorted(read) == sorted(wanted)
    whole = load_model(small_folder).state_dict()
    values = model.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in values.items())
    assert len(values) == len({*wanted} - {COPY}) and not any(value.is_meta for value in values.values())


def test_the_whole_is_read_when_it_is_wanted(small_folder: Path, read: list[str]) -> None:
    load_model(small_folder)
    assert sorted(read) == sorted(load_file(small_folder / "model.safetensors"))


@pytest.mark.parametrize(
    "names", [("lm_head",), ("decoder",), ("encoder", "lm_head"), ("shared", "decoder", "lm_head")]
)
def test_the_embedding_of_an_encoder_is_found_under_any_name(
    small_folder: Path, tmp_path: Path, read: list[str], names: tuple[str, ...]
) -> None:
    copy_checkpoint(small_folder, tmp_path / "c", keep_only(*names))
    model = load_model(tmp_path / "c", parts="encoder")
    assert torch.equal(model.language_model.shared.weight, load_file(small_folder / "model.safetensors")[HEAD])
    embeddings = [name for name in read if name.endswith(("shared.weight", "embed_tokens.weight", "lm_head.weight"))]
    assert len(embeddings) == 1


def test_other_layouts_and_pickles(native_folder: Path, small_folder: Path, tmp_path: Path) -> None:
    vision = load_model(native_folder, parts="vision").state_dict()
    whole = load_model(small_folder).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in vision.items())
    shutil.copytree(small_folder, tmp_path / "c")
    torch.save(load_file(small_folder / "model.safetensors"), tmp_path / "c" / "pytorch_model.bin")
    (tmp_path / "c" / "model.safetensors").unlink()
    pickled = load_model(tmp_path / "c", parts="vision", allow_pickle=True).state_dict()
    assert pickled.keys() == vision.keys() and all(torch.equal(pickled[name], vision[name]) for name in vision)


NORM = "language_model.model.encoder.layernorm_embedding.weight"
DECODER_NORM = "language_model.model.decoder.layernorm_embedding.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("image_projection"), "missing: image_projection"),
        (lambda t: t.pop(NORM), "missing: .*encoder.layernorm_embedding"),
        (lambda t: t.update({NORM: torch.ones(3)}), "misshapen: .*encoder.layernorm_embedding"),
        (lambda t: t.update({"foreign": torch.ones(3)}), "unexpected: foreign"),
        (lambda t: t[NORM].fill_(torch.nan), "encoder.layernorm_embedding.weight holds values that are not finite"),
        (lambda t: t[COPY].add_(1) if COPY in t else t.update({COPY: t[SHARED] + 1}), "several names"),
    ],
)
def test_a_part_is_checked_like_the_whole(
    small_folder: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    copy_checkpoint(small_folder, tmp_path / "c", change)
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path / "c", parts="encoder")


def test_the_rest_may_be_missing(small_folder: Path, tmp_path: Path) -> None:
    copy_checkpoint(small_folder, tmp_path / "c", lambda t: t.pop(DECODER_NORM))
    assert load_model(tmp_path / "c", parts="encoder").language_model.encoder is not None
    with pytest.raises(CheckpointError, match=r"missing: .*decoder.layernorm_embedding"):
        load_model(tmp_path / "c")


def test_what_needs_the_whole_model_says_so(small_folder: Path, tmp_path: Path) -> None:
    model = load_model(small_folder, parts="encoder")
    for use in (lambda: save_checkpoint(model, tmp_path / "new"), lambda: merge_adapter(model, tmp_path)):
        with pytest.raises(Florence2Error, match='text decoder is missing: .* load it with parts="all"'):
            use()
    assert not (tmp_path / "new").exists()


def test_a_part_is_an_ordinary_module(small_folder: Path) -> None:
    """Torch's own ways with a module do not count as a use of what is missing."""
    model = copy.deepcopy(load_model(small_folder, parts="vision")).to(torch.bfloat16).train().eval()
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert 'language model, loaded with parts="vision"' in repr(model)
    assert not hasattr(model.language_model, "_anything")
