"""Two checkpoints compared: what changed is found, with its size and its rank, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from florence2.checkpoints.checkpoint import convert_checkpoint, load_model
from florence2.checkpoints.files import read_json, write_json
from florence2.checkpoints.tensors import write_safetensors
from florence2.inspect.audit.difference import Difference, TensorDifference, compare_checkpoints
from tests.conftest import copy_checkpoint, without_bias
from tests.release import keep

Tensors = dict[str, torch.Tensor]
FC1 = "language_model.encoder.layers.0.fc1.weight"
SHARED = "language_model.shared.weight"


def by_name(found: Difference) -> dict[str, TensorDifference]:
    return {tensor.name: tensor for tensor in found.tensors}


def changed_names(found: Difference) -> list[str]:
    return [tensor.name for tensor in found.tensors if not tensor.identical]


def config_changes(found: Difference) -> dict[str, tuple[object, object]]:
    return {change.field: (change.a, change.b) for change in found.config}


@pytest.fixture
def changed(plain_folder: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], object]], Path]:
    """Return the small checkpoint with its tensors changed."""

    def copy(change: Callable[[Tensors], object]) -> Path:
        copy_checkpoint(plain_folder, tmp_path / "changed", change)
        return tmp_path / "changed"

    return copy


def make_adapter(folder: Path, rank: int, paths: list[str], plain_folder: Path) -> Path:
    """Return a LoRA adapter with random matrices for some linear maps."""
    model = load_model(plain_folder)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for path in paths:
        out, inside = model.get_submodule(path).weight.shape
        for letter, shape in (("A", (rank, inside)), ("B", (out, rank))):
            tensors[f"base_model.model.{path}.lora_{letter}.weight"] = torch.randn(shape, generator=generator) * 0.05
    words = [path.rpartition(".")[2] for path in paths]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "target_modules": words}
    folder.mkdir()
    write_json(folder / "adapter_config.json", config)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def test_a_checkpoint_and_itself(plain_folder: Path) -> None:
    found = compare_checkpoints(plain_folder, plain_folder)
    assert found.same and found.identical == len(found.tensors) == 160 and found.config == ()
    assert found.most_changed(10) == [] and (found.only_a, found.only_b, found.misfits) == ((), (), ())
    for tensor in found.tensors:
        assert tensor.change.relative == tensor.change.distance == tensor.change.maximum == 0
        assert tensor.change.cosine == pytest.approx(1) and tensor.spectrum is None


@pytest.mark.parametrize("dtype", keep([0], [torch.float32, torch.float16]))
def test_a_merged_adapter_shows_as_low_rank(dtype: torch.dtype, plain_folder: Path, tmp_path: Path) -> None:
    """Rank 3 in three maps, nothing anywhere else; rounding to float16 is not mistaken for a change of full rank."""
    paths = [
        "language_model.encoder.layers.0.fc1",
        "language_model.decoder.layers.0.encoder_attn.q_proj",
        "vision_tower.blocks.1.1.channel_block.ffn.fc2",
    ]
    adapter = make_adapter(tmp_path / "adapter", 3, paths, plain_folder)
    convert_checkpoint(plain_folder, tmp_path / "before", dtype=dtype)
    convert_checkpoint(plain_folder, tmp_path / "merged", dtype=dtype, adapter=adapter)
    found = compare_checkpoints(tmp_path / "before", tmp_path / "merged")
    assert sorted(changed_names(found)) == sorted(f"{path}.weight" for path in paths) and not found.same
    for path in paths:
        tensor = by_name(found)[f"{path}.weight"]
        assert tensor.spectrum is not None and tensor.spectrum.side >= 48
        assert 1 < tensor.spectrum.rank_99 <= 3 and tensor.spectrum.stable_rank < 3.01
        if dtype == torch.float32:
            assert tensor.spectrum.effective_rank < 3.1
    layers = {layer.name: layer for layer in found.layers}
    assert layers["language_model.encoder.layers.0"].identical == 15
    assert layers["language_model.encoder.layers.0"].rank_99 == by_name(found)[FC1].spectrum.rank_99
    assert layers["language_model.shared"].rank_99 is None


def test_a_change_is_measured(plain_folder: Path, changed) -> None:
    stored = "language_model.model.encoder.layers.0.fc1.weight"
    before = load_file(plain_folder / "model.safetensors")[stored]
    after = before.clone()
    after[3] *= 2
    after[9, 4] += 1
    found = compare_checkpoints(plain_folder, changed(lambda tensors: tensors.update({stored: after})))
    (tensor,) = found.most_changed(5)
    assert tensor.name == FC1 and tensor.change.changed == before.shape[1] + 1
    assert tensor.change.relative == pytest.approx(float((after - before).norm() / before.norm()))
    assert tensor.change.norms == pytest.approx((float(before.norm()), float(after.norm())))
    assert tensor.change.maximum == pytest.approx(float((after - before).abs().max()))
    assert tensor.spectrum is not None and tensor.spectrum.rank_99 == 2
    exact = torch.linalg.svdvals((after - before).double())
    assert tensor.spectrum.largest == pytest.approx(float(exact[0]))


def test_what_is_stored_transposed_is_compared_the_right_way_round(plain_folder: Path, changed) -> None:
    def scale_an_input(tensors: Tensors) -> None:
        tensors["image_projection"][5] *= 3

    tensor = by_name(compare_checkpoints(plain_folder, changed(scale_an_input)))[
        "multi_modal_projector.image_projection.weight"
    ]
    assert tensor.compared == (64, 48) and tensor.change.changed == 64
    assert tensor.spectrum is not None and tensor.spectrum.rank_99 == 1


def test_the_most_changed_come_first(plain_folder: Path, changed) -> None:
    def change(tensors: Tensors) -> None:
        tensors["language_model.model.encoder.layers.0.fc1.weight"] *= 1.1
        tensors["language_model.model.encoder.layers.0.fc2.weight"] *= 1.3
        tensors["visual_temporal_embed.pos_idx_to_embed"] *= 1.2

    found = compare_checkpoints(plain_folder, changed(change), spectra=False)
    assert [round(tensor.change.relative or 0, 5) for tensor in found.most_changed(2)] == [0.3, 0.2]
    assert len(found.most_changed(9)) == 3 and all(tensor.spectrum is None for tensor in found.tensors)


def test_layouts_and_the_rows_that_one_of_them_adds(converted_folder: Path, changed) -> None:
    """All that both have is equal; the embedding's padding is said, and no missing bias of zeros reported."""
    plain = changed(without_bias)
    found = compare_checkpoints(plain, converted_folder)
    assert found.identical == len(found.tensors) == 159 and not found.same
    assert (found.only_a, found.only_b, found.misfits) == ((), (), ())
    shared = by_name(found)[SHARED]
    assert shared.shapes == ((300, 64), (320, 64)) and shared.compared == (300, 64)
    changes = config_changes(found)
    assert changes["layout"] == ("microsoft", "native") and changes["text.vocab_size"] == (300, 320)


def test_another_type_is_no_change_where_it_holds_the_values(plain_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(plain_folder, tmp_path / "double", dtype=torch.float64)
    convert_checkpoint(plain_folder, tmp_path / "half", dtype=torch.bfloat16)
    wider = compare_checkpoints(plain_folder, tmp_path / "double", spectra=False)
    assert wider.same and by_name(wider)[FC1].dtypes == ("float32", "float64")
    narrower = compare_checkpoints(plain_folder, tmp_path / "half", spectra=False)
    assert not narrower.same and 0 < (by_name(narrower)[FC1].change.relative or 0) < 2**-8


def test_what_one_of_them_lacks_and_what_does_not_fit(plain_folder: Path, changed) -> None:
    def change(tensors: Tensors) -> None:
        tensors["left.over"] = torch.ones(2, 3)
        del tensors["language_model.model.encoder.layernorm_embedding.bias"]
        tensors["language_model.model.encoder.layers.0.fc1.weight"] = torch.ones(5, 6)
        positions = "language_model.model.encoder.embed_positions.weight"
        tensors[positions] = tensors[positions][:500].clone()

    folder = changed(change)
    config = read_json(folder / "config.json")
    config["text_config"]["dropout"] = 0.25
    write_json(folder / "config.json", config)
    found = compare_checkpoints(plain_folder, folder, spectra=False)
    assert found.only_a == ("language_model.encoder.layernorm_embedding.bias",)
    assert found.only_b == ("unknown: left.over",) and found.misfits == (FC1,)
    positions = by_name(found)["language_model.encoder.embed_positions.weight"]
    assert positions.identical and positions.compared == (500, 64)
    assert config_changes(found) == {"text.dropout": (0.1, 0.25)}
    assert found.identical == len(found.tensors) == 158 and not found.same
    assert found.b.problems and not found.a.problems


def test_a_common_part_that_changed(plain_folder: Path, changed) -> None:
    def change(tensors: Tensors) -> None:
        tensors["language_model.final_logits_bias"] = tensors["language_model.final_logits_bias"][:, :200] + 1

    found = compare_checkpoints(plain_folder, changed(change), spectra=False)
    bias = by_name(found)["final_logits_bias"]
    assert bias.compared == (1, 200) and bias.change.changed == 200 and bias.change.maximum == pytest.approx(1)


def test_values_that_are_not_finite(plain_folder: Path, changed) -> None:
    def damage(tensors: Tensors) -> None:
        tensors["language_model.model.encoder.layers.0.fc1.weight"][0, 0] = torch.nan

    found = compare_checkpoints(plain_folder, changed(damage))
    (tensor,) = found.most_changed(5)
    assert (tensor.change.changed, tensor.change.non_finite, tensor.spectrum) == (1, 1, None)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["identical"] == 159 and values["same"] is False and "config" not in values["a"]


def test_progress_tells_of_each_piece_of_work(plain_folder: Path, changed) -> None:
    folder = changed(lambda tensors: tensors["image_projection"].mul_(2))
    calls: list[tuple[str, int, int]] = []
    compare_checkpoints(
        plain_folder,
        folder,
        spectra=False,
        progress=lambda things: lambda done, total: calls.append((things, done, total)),
    )
    last = {things: (done, total) for things, done, total in calls}
    assert list(last.values()) == [(160, 160), (160, 160), (1, 1)] and len(calls) == 161 + 161 + 2


def test_sharded_against_whole(plain_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(plain_folder / "model.safetensors")
    tensors["image_projection"] = tensors["image_projection"] * 2
    names = sorted(tensors)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in ("part-0.safetensors", "part-1.safetensors"):
        save_file({name: tensors[name] for name in names if places[name] == shard}, tmp_path / shard)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": places})
    (tmp_path / "config.json").write_bytes((plain_folder / "config.json").read_bytes())
    found = compare_checkpoints(plain_folder, tmp_path, spectra=False)
    (tensor,) = found.most_changed(9)
    assert tensor.name.endswith("image_projection.weight") and tensor.change.relative == pytest.approx(1)
