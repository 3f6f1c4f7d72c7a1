"""A folder <-> a model: loading verified, saving, conversion."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import florence2
from florence2.checkpoints.checkpoint import convert_checkpoint, find_misfits, load_model, save_checkpoint
from florence2.checkpoints.describe import describe_checkpoint
from florence2.checkpoints.tensors import find_weights
from florence2.errors import CheckpointError, ConfigError
from tests.conftest import copy_checkpoint, keep_only, without_bias

HEAD = "language_model.lm_head.weight"
DECODER = "language_model.model.decoder.embed_tokens.weight"
Tensors = dict[str, Tensor]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(a: florence2.Florence2Model, b: florence2.Florence2Model) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_loading_gives_the_stored_values(small_folder: Path) -> None:
    model, stored = load_model(small_folder), weights_of(small_folder)
    assert torch.equal(model.multi_modal_projector.image_projection.weight, stored["image_projection"].T)
    assert torch.equal(model.final_logits_bias, stored["language_model.final_logits_bias"])
    assert not model.training and not any(tensor.is_meta for tensor in model.state_dict().values())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_the_model_does_not_hang_on_the_file(small_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_folder, copy)
    model = load_model(copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(100)  # a mapped file would take the process with it
    assert same_weights(model, load_model(small_folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(small_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    assert {tensor.dtype for tensor in load_model(small_folder, dtype=dtype).state_dict().values()} == {dtype}
    convert_checkpoint(small_folder, tmp_path / "c", dtype=dtype)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "c").values()} == {dtype}
    again = load_model(tmp_path / "c")
    assert torch.equal(
        again.language_model.shared.weight, load_model(small_folder).language_model.shared.weight.to(dtype).float()
    )


@pytest.mark.parametrize(
    "names", [("shared",), ("lm_head",), ("encoder",), ("decoder",), ("shared", "encoder", "decoder", "lm_head")]
)
def test_the_tied_embedding_under_any_of_its_names(small_folder: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    copy_checkpoint(small_folder, tmp_path / "c", keep_only(*names))
    assert same_weights(load_model(tmp_path / "c"), load_model(small_folder))


def test_both_layouts_hold_the_same_model(small_folder: Path, native_folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    copy_checkpoint(small_folder, plain, without_bias)
    microsoft, native = load_model(plain), load_model(native_folder)
    assert native.config.layout == "native" and native.config.text.vocab_size == 51328
    for name, tensor in microsoft.state_dict().items():
        other = native.state_dict()[name]
        if name == "language_model.shared.weight":
            other = other[:51289]
        if name == "final_logits_bias":
            other = other[:, :51289]
        assert torch.equal(tensor, other), name


def test_there_and_back_is_the_identity(small_folder: Path, native_folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    copy_checkpoint(small_folder, plain, without_bias)
    convert_checkpoint(native_folder, tmp_path / "back")
    first, second = weights_of(plain), weights_of(tmp_path / "back")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (plain / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()


def test_rows_added_for_the_native_layout_are_never_the_best(native_folder: Path) -> None:
    model = load_model(native_folder)
    hidden = torch.randn(500, 64)
    logits = hidden @ model.language_model.shared.weight.T
    assert (logits[:, 51289:].amax(1) < logits[:, :51289].topk(100).values[:, -1]).all()


def test_what_the_native_layout_cannot_say_is_refused(small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="final_logits_bias is not zero everywhere"):
        convert_checkpoint(small_folder, tmp_path / "n", "native")
    assert not (tmp_path / "n").exists()


def test_pickle_to_safetensors(small_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(small_folder, folder)
    torch.save(weights_of(small_folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only as a pickle"):
        load_model(folder)
    convert_checkpoint(folder / "pytorch_model.bin", tmp_path / "c", allow_pickle=True)
    for loaded in (load_model(tmp_path / "c"), load_model(folder, allow_pickle=True)):
        assert same_weights(loaded, load_model(small_folder))


def split_into_shards(folder: Path) -> None:
    """Put a checkpoint's tensors into two files with an index."""
    tensors = weights_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded(small_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(small_folder, folder)
    split_into_shards(folder)
    assert same_weights(load_model(folder), load_model(small_folder))


# ---- one error that lists everything --------------------------------------------------------------------------------


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["image_proj_norm.weight"].fill_(float("nan"))
    tensors["vision_tower.convs.0.proj.bias"][0] = float("inf")
    tensors["language_model.model.encoder.layers.0.fc1.bias"] = torch.ones(3)
    tensors["language_model.model.encoder.layers.9.fc1.bias"] = torch.ones(3)
    tensors["mystery"] = torch.ones(2, 2)
    del tensors["language_model.model.decoder.layers.0.fc2.weight"]


def test_everything_wrong_is_in_one_error(small_folder: Path, tmp_path: Path) -> None:
    copy_checkpoint(small_folder, tmp_path / "c", poison)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "c")
    text = str(error.value)
    for line in (
        "image_proj_norm.weight holds values that are not finite",
        "vision_tower.convs.0.proj.bias holds values that are not finite",
        "misshapen: language_model.model.encoder.layers.0.fc1.bias is [3], should be [128]",
        "unexpected: language_model.model.encoder.layers.9.fc1.bias [3]",
        "unexpected: mystery [2, 2]",
        "missing: language_model.model.decoder.layers.0.fc2.weight [64, 128]",
        "nothing was loaded",
    ):
        assert line in text, text


def test_an_embedding_with_two_values_is_refused(small_folder: Path, tmp_path: Path) -> None:
    """Microsoft's code has one embedding for prompts and answers; only its output projection may differ."""

    def differ(tensors: Tensors) -> None:
        tensors[DECODER] = tensors["language_model.model.shared.weight"].clone()
        tensors[DECODER][7].add_(1)

    copy_checkpoint(small_folder, tmp_path / "c", differ)
    with pytest.raises(CheckpointError, match="stored under several names, but .*weight has other values"):
        load_model(tmp_path / "c")


def test_values_beyond_the_wanted_type_are_refused(small_folder: Path, tmp_path: Path) -> None:
    copy_checkpoint(small_folder, tmp_path / "c", lambda t: t["image_projection"].mul_(1e6))
    load_model(tmp_path / "c")
    with pytest.raises(CheckpointError, match="not finite \\(as torch.float16\\)"):
        load_model(tmp_path / "c", dtype=torch.float16)
    with pytest.raises(CheckpointError, match="does not fit into torch.float16"):
        save_checkpoint(load_model(tmp_path / "c"), tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


def test_foreign_and_broken_checkpoints(small_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c"
    shutil.copytree(small_folder, copy)
    save_file({"bert.embeddings": torch.ones(2)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"neither layout of Florence-2.*bert\.embeddings"):
        load_model(copy)
    save_file({}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="neither layout"):
        load_model(copy)
    (copy / "model.safetensors").write_bytes((small_folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)config\.json does not exist.*truncated"):  # both are said
        load_model(copy)
    shutil.copyfile(small_folder / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_model(copy)


def test_a_configuration_of_another_model_is_refused_by_its_shapes(small_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c"
    shutil.copytree(small_folder, copy)
    values = json.loads((copy / "config.json").read_text())
    values["text_config"]["encoder_layers"] = 2
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"missing: language_model\.model\.encoder\.layers\.1\.self_attn"):
        load_model(copy)


def test_huge_sizes_in_the_configuration_take_no_memory(small_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c"
    shutil.copytree(small_folder, copy)
    values = json.loads((copy / "config.json").read_text())
    values["text_config"]["encoder_ffn_dim"] = 2**20  # gigabytes, on the meta device nothing
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="misshapen"):
        load_model(copy)


def test_converting_onto_the_source_is_refused(small_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        convert_checkpoint(small_folder / "model.safetensors", small_folder)


@pytest.mark.parametrize(
    "prefix", ["model.", "module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "net."]
)
@pytest.mark.parametrize("layout", ["microsoft", "native"])
def test_names_with_a_prefix_are_one_line(
    prefix: str, layout: str, small_folder: Path, native_folder: Path, tmp_path: Path
) -> None:
    """As Lightning, DistributedDataParallel, torch.compile and peft write them."""
    copy_checkpoint(small_folder if layout == "microsoft" else native_folder, tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, tmp_path / "c" / "model.safetensors")
    for use in (load_model, describe_checkpoint):
        with pytest.raises(CheckpointError, match=f"begin with '{prefix}', which a wrapper") as error:
            use(tmp_path / "c")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prefixes", "words"),
    [
        (("module.", "_orig_mod."), "All [0-9]+ tensors .* begin with '_orig_mod.' or 'module.', which a wrapper"),
        (("module.", "_orig_mod.", "model."), "begin with '_orig_mod.' or 'model.' or 'module.', which a wrapper"),
        (("module.", ""), "[0-9]+ of [0-9]+ tensors .* begin with 'module.', which a wrapper"),
        (("", "net._orig_mod.", ""), "[0-9]+ of [0-9]+ tensors .* begin with 'net._orig_mod.', which a wrapper"),
    ],
)
@pytest.mark.parametrize("layout", ["microsoft", "native"])
def test_a_mix_of_prefixes_is_one_line(
    prefixes: tuple[str, ...], words: str, layout: str, small_folder: Path, native_folder: Path, tmp_path: Path
) -> None:
    copy_checkpoint(small_folder if layout == "microsoft" else native_folder, tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    mixed = {f"{prefixes[i % len(prefixes)]}{name}": tensor for i, (name, tensor) in enumerate(tensors.items())}
    save_file(mixed, tmp_path / "c" / "model.safetensors")
    for use in (load_model, describe_checkpoint):
        with pytest.raises(CheckpointError, match=words) as error:
            use(tmp_path / "c")
        assert "\n" not in str(error.value) and "Save the model inside the wrapper, or remove" in str(error.value)


def test_names_that_wrappers_do_not_make_are_listed(small_folder: Path, tmp_path: Path) -> None:
    """A few strange names, and a second tower of a model that was changed."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["module.image_projection"] = tensors.pop("image_projection")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tower = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_tower.")}
        for prefix in ("extra.", "twin."):
            tensors.update({f"{prefix}{name}": tensor.clone() for name, tensor in tower.items()})

    for name, change in (("renamed", rename), ("added", add)):
        copy_checkpoint(small_folder, tmp_path / name, change)
        with pytest.raises(CheckpointError, match="does not fit its config.json; nothing was loaded"):
            load_model(tmp_path / name)


def test_a_native_checkpoint_whose_names_all_begin_with_model(native_folder: Path, tmp_path: Path) -> None:
    """The output projection is tied, and transformers may leave it out."""
    copy_checkpoint(native_folder, tmp_path / "c", lambda tensors: tensors.pop("lm_head.weight", None))
    assert all(name.startswith("model.") for name in load_file(tmp_path / "c" / "model.safetensors"))
    assert same_weights(load_model(tmp_path / "c"), load_model(native_folder))


def test_long_lists_are_cut(small_folder: Path, tmp_path: Path) -> None:
    """Eight-bit values in every tensor, and a tensor of another shape everywhere."""
    for name, change in (
        ("a", lambda tensor: tensor.to(torch.float8_e4m3fn)),
        ("b", lambda tensor: tensor[None]),
    ):
        copy_checkpoint(small_folder, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        save_file({key: change(tensor) for key, tensor in tensors.items()}, tmp_path / name / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"and \d+ more") as error:
            load_model(tmp_path / name)
        assert str(error.value).count("\n") < 25


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "preprocessor_config.json"])
def test_a_pointer_of_git_lfs_is_one_line(name: str, small_folder: Path, tmp_path: Path) -> None:
    copy_checkpoint(small_folder, tmp_path / "c")
    (tmp_path / "c" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9759903\n")
    with pytest.raises(florence2.Florence2Error, match=f"{name} is a Git LFS pointer, .*git lfs pull") as error:
        florence2.load(tmp_path / "c")
    assert "\n" not in str(error.value)


def test_a_pickled_pointer_too(small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer"):
        find_weights(tmp_path, allow_pickle=True).read_headers()


def test_extra_rows_of_the_native_layout_are_unlikely(native_folder: Path, small_folder: Path) -> None:
    """They are the mean of all others, so that none of their logits is among the likely ones."""
    f, converted = florence2.load(small_folder), load_model(native_folder)
    rows, more = f.model.config.text.vocab_size, converted.config.text.vocab_size
    table = converted.language_model.shared.weight.detach()
    assert more > rows and torch.allclose(table[rows:], table[:rows].mean(dim=0), atol=1e-3)
    torch.manual_seed(0)
    logits = torch.randn(50, table.shape[1]) @ table.T
    assert (logits[:, rows:].max(dim=1).values < logits[:, :rows].quantile(0.9, dim=1)).all()
    assert float(table[rows:].abs().max()) > 0


def test_converting_without_a_tokenizer(small_folder: Path, tmp_path: Path) -> None:
    copy_checkpoint(small_folder, tmp_path / "c", without_bias)
    (tmp_path / "c" / "tokenizer.json").unlink()
    for layout in ("microsoft", "native"):
        convert_checkpoint(tmp_path / "c", tmp_path / layout, layout)
        assert load_model(tmp_path / layout).config.layout == layout
        assert not (tmp_path / layout / "tokenizer.json").exists()


def test_the_tokenizer_is_copied_where_the_layout_stays(
    small_folder: Path, native_folder: Path, tmp_path: Path
) -> None:
    for source, layout, equal in (
        (small_folder, "microsoft", True),
        (native_folder, "native", True),
        (native_folder, "microsoft", False),
    ):
        target = tmp_path / f"{source.name}-{layout}"
        convert_checkpoint(source, target, layout)
        same = (source / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
        assert same is equal


def test_misfits_are_listed_without_loading(small_folder: Path, tmp_path: Path) -> None:
    config = load_model(small_folder).config
    assert find_misfits(find_weights(small_folder), config) == []
    copy_checkpoint(small_folder, tmp_path / "c", lambda tensors: tensors.pop("image_projection"))
    (problem,) = find_misfits(find_weights(tmp_path / "c"), config)
    assert problem.startswith("missing: image_projection")
