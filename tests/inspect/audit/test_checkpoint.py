"""Audits of whole checkpoints, sound and damaged."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from florence2.checkpoints.checkpoint import convert_checkpoint, load_model
from florence2.checkpoints.files import write_json
from florence2.checkpoints.layouts import TRANSPOSED, from_canonical, to_canonical
from florence2.errors import CheckpointError
from florence2.inspect.audit.checkpoint import Audit, TensorAudit, audit
from tests.conftest import copy_checkpoint, without_bias

Tensors = dict[str, torch.Tensor]
NORM = "language_model.model.encoder.layernorm_embedding.weight"
QUERY = "language_model.model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sound(plain_folder: Path) -> Audit:
    return audit(plain_folder)


@pytest.fixture
def changed(plain_folder: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], object]], Path]:
    """Return the small checkpoint with its tensors changed."""

    def copy(change: Callable[[Tensors], object]) -> Path:
        copy_checkpoint(plain_folder, tmp_path / "changed", change)
        return tmp_path / "changed"

    return copy


def by_name(found: Audit) -> dict[str, TensorAudit]:
    return {tensor.name: tensor for tensor in found.tensors}


def messages(found: Audit, kind: str) -> list[str]:
    return [finding.message for finding in found.findings if finding.kind == kind]


def test_every_tensor_of_the_model_is_measured(sound: Audit, plain_folder: Path) -> None:
    model = load_model(plain_folder).state_dict()
    tensors = by_name(sound)
    assert tensors.keys() == model.keys() and sound.findings == () and sound.layout == "microsoft"
    for name, value in model.items():
        found, exact = tensors[name], value.double()
        assert found.shape == tuple(value.shape) and found.parameters == value.numel()
        assert found.values.norm == pytest.approx(float(exact.norm())), name
        assert found.values.mean == pytest.approx(float(exact.mean()), abs=1e-12), name
        if name.endswith(".weight") and value.ndim > 1:
            largest = float(torch.linalg.matrix_norm(exact.flatten(1), 2))
            assert found.spectrum is not None and found.spectrum.largest == pytest.approx(largest), name
        else:
            assert found.spectrum is None, name
    assert sound.parameters == sum(value.numel() for value in model.values())


def test_layers_in_the_order_of_the_computation(sound: Audit) -> None:
    assert [module.name for module in sound.modules] == [
        "vision_tower.convs.0",
        "vision_tower.blocks.0.0",
        "vision_tower.convs.1",
        "vision_tower.blocks.1.0",
        "vision_tower.blocks.1.1",
        "multi_modal_projector",
        "language_model.shared",
        "language_model.encoder",
        "language_model.encoder.layers.0",
        "language_model.decoder",
        "language_model.decoder.layers.0",
        "final_logits_bias",
    ]
    layer = next(module for module in sound.modules if module.name == "language_model.encoder.layers.0")
    inside = [tensor for tensor in sound.tensors if tensor.name.startswith(layer.name + ".")]
    assert layer.tensors == len(inside) == 16 and layer.dtypes == ("float32",)
    assert layer.parameters == sum(tensor.parameters for tensor in inside)
    assert layer.norm == pytest.approx(math.sqrt(sum(tensor.values.norm**2 for tensor in inside)))
    maps = [tensor.spectrum for tensor in inside if tensor.spectrum]
    assert layer.largest == max(spectrum.largest for spectrum in maps) and len(maps) == 6
    assert layer.effective_rank == pytest.approx(sum(s.effective_rank / s.side for s in maps) / 6)


def test_both_layouts_give_one_audit(plain_folder: Path, tmp_path: Path, changed) -> None:
    """The tensors under their native names, nothing else changed."""
    plain = changed(without_bias)
    stored = load_file(plain / "model.safetensors")
    native = {}
    for name, value in stored.items():
        canonical = to_canonical(name, "microsoft")
        renamed = from_canonical(canonical, "native")
        if renamed is not None and canonical != "final_logits_bias":
            native[renamed] = (value.T if canonical in TRANSPOSED["microsoft"] else value).contiguous()
    (tmp_path / "native").mkdir()
    save_file(native, tmp_path / "native" / "model.safetensors")
    a, b = audit(plain), audit(tmp_path / "native")
    assert (a.layout, b.layout, a.sha256) == ("microsoft", "native", b.sha256)
    for name, tensor in by_name(b).items():
        other = by_name(a)[name]
        assert (tensor.sha256, tensor.values, tensor.spectrum) == (other.sha256, other.values, other.spectrum), name
    assert by_name(a).keys() - by_name(b).keys() == {"final_logits_bias"}


def test_conversion_changes_the_padded_embedding_alone(plain_folder: Path, converted_folder: Path, changed) -> None:
    a, b = audit(changed(without_bias), spectra=False), audit(converted_folder, spectra=False)
    different = [name for name, tensor in by_name(b).items() if tensor.sha256 != by_name(a)[name].sha256]
    assert different == ["language_model.shared.weight"] and a.sha256 != b.sha256 and b.findings == ()


def test_shards_and_single_files(sound: Audit, plain_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(plain_folder / "model.safetensors")
    names = sorted(tensors, key=lambda name: name[::-1])
    places = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == shard}, tmp_path / shard)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": places})
    (tmp_path / "config.json").write_bytes((plain_folder / "config.json").read_bytes())
    sharded = audit(tmp_path)
    assert sharded.tensors == sound.tensors and sharded.sha256 == sound.sha256 and sharded.findings == ()
    assert audit(plain_folder / "model.safetensors").tensors == sound.tensors


def test_pickles_only_when_asked(sound: Audit, plain_folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(plain_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((plain_folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="only as a pickle"):
        audit(tmp_path)
    assert audit(tmp_path, allow_pickle=True).tensors == sound.tensors


def test_another_type_is_noted_and_hashed_as_such(sound: Audit, plain_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(plain_folder, tmp_path / "half", dtype=torch.float16)
    found = audit(tmp_path / "half", spectra=False)
    assert dict(found.dtypes) == {"float16": found.parameters} and found.sha256 != sound.sha256
    assert {tensor.dtype for tensor in found.tensors} == {"float16"} and found.findings == ()
    assert all(tensor.spectrum is None for tensor in found.tensors)


def test_values_that_are_not_finite_are_audited(changed) -> None:
    """Loading refuses such a checkpoint; the audit says where, and how many."""

    def damage(tensors: Tensors) -> None:
        tensors[f"{QUERY}.weight"][1, 2:5] = math.nan
        tensors[f"{QUERY}.weight"][3, 3] = -math.inf

    folder = changed(damage)
    with pytest.raises(CheckpointError, match="not finite"):
        load_model(folder)
    found = audit(folder)
    tensor = by_name(found)["language_model.encoder.layers.0.self_attn.q_proj.weight"]
    assert (tensor.values.nan, tensor.values.infinite, tensor.non_finite, tensor.spectrum) == (3, 1, 4, None)
    assert math.isfinite(tensor.values.norm) and tensor.dead_rows.count == 0
    (problem,) = found.problems
    assert problem.kind == "non-finite" and problem.message.endswith(
        "q_proj.weight holds 3 NaN and 1 infinite of 4,096"
    )
    assert [module.non_finite for module in found.modules if module.non_finite] == [4]
    json.dumps(found.to_dict(), allow_nan=False)


def test_dead_units_are_to_know(changed) -> None:
    def kill(tensors: Tensors) -> None:
        tensors[f"{QUERY}.weight"][7] = 0
        tensors[f"{QUERY}.weight"][:, 9] *= 1e-6
        tensors[NORM][5] = 1e-5
        tensors["vision_tower.convs.1.proj.weight"][:, 4] = 0
        tensors["image_projection"][2] = 0  # stored the other way round: an input
        tensors["language_model.model.encoder.layers.0.fc1.weight"].zero_()

    found = audit(changed(kill), spectra=False)
    assert not found.problems and set(messages(found, "dead")) == {
        "vision_tower.convs.1.conv.weight: 1 of 24 columns are dead (4)",
        "multi_modal_projector.image_projection.weight: 1 of 48 columns are dead (2)",
        "language_model.encoder.layernorm_embedding.weight: 1 of 64 scales are dead (5)",
        "language_model.encoder.layers.0.self_attn.q_proj.weight: 1 of 64 rows are dead (7)",
        "language_model.encoder.layers.0.self_attn.q_proj.weight: 1 of 64 columns are dead (9)",
    }
    assert messages(found, "zero") == ["language_model.encoder.layers.0.fc1.weight is zero everywhere"]


def test_ties(changed) -> None:
    """The embedding under four names, of which one differs; and two maps that are equal."""

    def tie(tensors: Tensors) -> None:
        shared = tensors["language_model.model.shared.weight"]
        tensors["language_model.model.encoder.embed_tokens.weight"] = shared.clone()
        tensors["language_model.model.decoder.embed_tokens.weight"] = shared + 1
        tensors[f"{QUERY}.weight"] = tensors[f"{QUERY.replace('q_proj', 'k_proj')}.weight"].clone()
        tensors[f"{QUERY}.bias"].zero_()
        tensors[f"{QUERY.replace('q_proj', 'k_proj')}.bias"].zero_()

    found = audit(changed(tie), spectra=False)
    assert by_name(found)["language_model.shared.weight"].stored == (
        "language_model.model.shared.weight",
        "language_model.lm_head.weight",
        "language_model.model.decoder.embed_tokens.weight",
        "language_model.model.encoder.embed_tokens.weight",
    )
    (differing,) = found.problems
    assert differing.kind == "tie" and "decoder.embed_tokens.weight is not equal" in differing.message
    maps = tuple(f"language_model.encoder.layers.0.self_attn.{letter}_proj.weight" for letter in "kq")
    assert found.equal == (maps,) and messages(found, "equal") == [f"{maps[0]} and {maps[1]} are equal bit for bit"]
    with pytest.raises(CheckpointError, match="under several names"):
        load_model(Path(found.path))


def test_shapes_that_do_not_fit_are_problems(changed) -> None:
    def misfit(tensors: Tensors) -> None:
        tensors[f"{QUERY}.bias"] = torch.ones(7)
        tensors["left.over"] = torch.arange(6.0).reshape(2, 3)
        del tensors[NORM]

    found = audit(changed(misfit), spectra=False)
    assert {problem.message for problem in found.problems} == {
        f"misshapen: {QUERY}.bias is [7], should be [64]",
        "unexpected: left.over [2, 3]",
        f"missing: {NORM} [64]",
    }
    assert found.tensors[-1].name == "unknown: left.over" and found.tensors[-1].parameters == 6
    assert found.problems == found.findings[:3]


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "florence2"}'])
def test_without_a_configuration_the_weights_are_audited(content: str | None, sound: Audit, changed) -> None:
    folder = changed(lambda tensors: None)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    found = audit(folder)
    assert found.tensors == sound.tensors and found.config is None
    (problem,) = found.problems
    assert problem.kind == "config" and "config.json" in problem.message


def test_odd_tensors_do_not_stop_it(changed) -> None:
    """A scalar and an empty one, which no Florence-2 has."""
    found = audit(changed(lambda t: t.update({"scalar": torch.tensor(2.0), "empty.weight": torch.zeros(0, 3)})))
    tensors = by_name(found)
    assert tensors["unknown: scalar"].values.norm == 2 and tensors["unknown: empty.weight"].parameters == 0
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="neither layout"):
        audit(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors"):
        audit(tmp_path)


def test_progress(plain_folder: Path, sound: Audit) -> None:
    calls: list[tuple[int, int]] = []
    audit(plain_folder, spectra=False, progress=lambda done, total: calls.append((done, total)))
    count = len(sound.tensors)
    assert calls == [(i, count) for i in range(count + 1)]


def test_json_holds_everything(sound: Audit) -> None:
    values = json.loads(json.dumps(sound.to_dict(), allow_nan=False))
    assert values.keys() == {
        "path", "layout", "dtypes", "parameters", "parts", "sha256", "modules", "tensors", "equal", "findings"
    }  # fmt: skip
    assert sum(values["parts"].values()) == values["parameters"]
    tensor = next(t for t in values["tensors"] if t["name"] == "multi_modal_projector.image_projection.weight")
    assert tensor["stored"] == ["image_projection"] and tensor["shape"] == [64, 48] and tensor["spectrum"]["side"] == 48
