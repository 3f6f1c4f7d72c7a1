"""LoRA adapters: found by any of three names, merged as the formula says, or refused whole."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import florence2
from florence2.checkpoints.adapters import MAX_NAMES, MAX_PATTERNS, _is_harmless, merge_adapter, read_adapter_config
from florence2.checkpoints.checkpoint import convert_checkpoint, load_model
from florence2.checkpoints.files import write_tasks
from florence2.checkpoints.hub import find_adapter, resolve_adapter
from florence2.checkpoints.layouts import from_canonical
from florence2.checkpoints.merging.plan import _possible_paths
from florence2.cli.main import main
from florence2.errors import CheckpointError, ConfigError
from florence2.inputs.tasks import TaskTable, token_task
from florence2.model.florence2 import Florence2Model
from tests.release import keep

MICROSOFT = {
    "vision_tower.blocks.0.0.spatial_block.window_attn.qkv": "vision_tower.blocks.0.0.spatial_block.window_attn.fn.qkv",
    "vision_tower.blocks.1.1.channel_block.ffn.fc2": "vision_tower.blocks.1.1.channel_block.ffn.fn.net.fc2",
    "vision_tower.convs.1.conv": "vision_tower.convs.1.proj",
    "multi_modal_projector.image_position_embed.row_embeddings": "image_pos_embed.row_embeddings",
    "language_model.encoder.layers.0.fc1": "language_model.model.encoder.layers.0.fc1",
    "language_model.decoder.layers.0.encoder_attn.q_proj": "language_model.model.decoder.layers.0.encoder_attn.q_proj",
}
"""Our paths of modules, one of each kind, and Microsoft's."""
CANONICAL = {path: path for path in MICROSOFT}
NATIVE = {path: f"model.{path}" for path in [*MICROSOFT, "multi_modal_projector.image_projection"]}
NAMINGS = {"microsoft": MICROSOFT, "native": NATIVE, "canonical": CANONICAL}

LINEAR = "language_model.encoder.layers.0.fc1"
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "bias": "none", "target_modules": ["fc1"]}


@pytest.fixture
def model(small_folder: Path) -> Florence2Model:
    return load_model(small_folder)


def matrices(module: nn.Module, rank: int, seed: int = 0) -> dict[str, Tensor]:
    """A and B as peft names and shapes them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if isinstance(module, nn.Embedding):
        rows, width = module.weight.shape
        return {"lora_embedding_A": draw(rank, rows), "lora_embedding_B": draw(width, rank)}
    out, *rest = module.weight.shape
    return {"lora_A.weight": draw(rank, *rest), "lora_B.weight": draw(out, rank, *(1 for _ in rest[1:]))}


def write(folder: Path, tensors: dict[str, Tensor], **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def adapter(
    folder: Path, model: Florence2Model, names: dict[str, str], prefix: str = "base_model.model.", **changes: object
) -> Path:
    """One with matrices of rank 3 for the modules `names`, by the names that they are mapped to."""
    tensors = {}
    for seed, (path, name) in enumerate(names.items()):
        for part, matrix in matrices(model.get_submodule(path), 3, seed).items():
            tensors[f"{prefix}{name}.{part}"] = matrix
    return write(folder, tensors, **changes)


def answer(module: nn.Module) -> Tensor:
    """What a module makes of some input, with nothing of the project's in between."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, nn.Embedding):
        return F.embedding(torch.arange(7), module.weight)
    if isinstance(module, nn.Conv2d):
        x = torch.randn(2, module.in_channels, 9, 11, generator=generator)
        return F.conv2d(x, module.weight, None, module.stride, module.padding)
    return F.linear(torch.randn(5, module.weight.shape[1], generator=generator), module.weight)


def lora_answer(module: nn.Module, seed: int, rank: int = 3) -> Tensor:
    """What peft adds to that before scaling: the input through A, then through B."""
    generator = torch.Generator().manual_seed(1)
    a, b = matrices(module, rank, seed).values()
    if isinstance(module, nn.Embedding):
        return F.embedding(torch.arange(7), a.T) @ b.T
    if isinstance(module, nn.Conv2d):
        x = torch.randn(2, module.in_channels, 9, 11, generator=generator)
        return F.conv2d(F.conv2d(x, a, None, module.stride, module.padding), b)
    return F.linear(F.linear(torch.randn(5, module.weight.shape[1], generator=generator), a), b)


@pytest.mark.parametrize("prefix", keep([0], ["base_model.model.", ""]))
@pytest.mark.parametrize("naming", NAMINGS)
def test_merged_is_the_map_and_scale_times_its_low_rank_one(
    naming: str, prefix: str, model: Florence2Model, small_folder: Path, tmp_path: Path
) -> None:
    names = NAMINGS[naming]
    merge_adapter(model, adapter(tmp_path, model, names, prefix))
    before = load_model(small_folder)
    for seed, path in enumerate(names):
        old, new = before.get_submodule(path), model.get_submodule(path)
        torch.testing.assert_close(answer(new), answer(old) + 12 / 3 * lora_answer(old, seed), atol=2e-4, rtol=1e-4)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])]
    assert sorted(changed) == sorted(f"{path}.weight" for path in names)


def change_of(model: Florence2Model, folder: Path, path: str = LINEAR) -> Tensor:
    weight = model.get_submodule(path).weight
    before = weight.detach().clone()
    merge_adapter(model, folder)
    return weight.detach() - before


def product(model: Florence2Model, rank: int = 3, path: str = LINEAR) -> Tensor:
    a, b = matrices(model.get_submodule(path), rank).values()
    return b @ a


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4)


def test_rslora_divides_by_the_root_of_the_rank(model: Florence2Model, tmp_path: Path) -> None:
    folder = adapter(tmp_path, model, {LINEAR: LINEAR}, use_rslora=True)
    assert close(change_of(model, folder), 12 / math.sqrt(3) * product(model))


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("fc1", True),
        ("layers.0.fc1", True),
        (LINEAR, True),
        (f"^model.{LINEAR}", True),
        (r".*\.encoder\.layers\.\d+\.fc[12]", True),
        ("c1", False),
        ("encoder", False),
        (f"^{LINEAR}", False),
    ],
)
def test_patterns_are_read_as_peft_reads_them(
    pattern: str, matches: bool, model: Florence2Model, tmp_path: Path
) -> None:
    """On the end of the name in the file's naming; the first that matches counts."""
    tensors = matrices(model.get_submodule(LINEAR), 5)
    named = {f"base_model.model.model.{LINEAR}.{part}": matrix for part, matrix in tensors.items()}
    rank = 9 if matches else 5  # the rank otherwise
    folder = write(
        tmp_path, named, r=rank, rank_pattern={pattern: 5}, alpha_pattern={pattern: 2.5, "fc1": 99.0, "fc2": 1}
    )
    if pattern == "fc1":
        folder = write(tmp_path, named, r=rank, rank_pattern={pattern: 5}, alpha_pattern={"fc2": 99, pattern: 2.5})
    assert close(change_of(model, folder), (2.5 if matches else 99) / 5 * product(model, 5))


def test_half_precision_is_rounded_once(small_folder: Path, tmp_path: Path) -> None:
    model = load_model(small_folder, dtype=torch.bfloat16)
    folder = adapter(tmp_path, model, {LINEAR: LINEAR})
    before = model.get_submodule(LINEAR).weight.detach().float()
    merge_adapter(model, folder)
    expected = (before + 4.0 * product(model)).bfloat16()
    assert torch.equal(model.get_submodule(LINEAR).weight, expected)


def test_every_module_is_found_by_each_of_its_names(model: Florence2Model) -> None:
    for path, module in model.named_modules():
        if not hasattr(module, "weight") or path == "multi_modal_projector.image_projection":
            continue
        native, microsoft = (from_canonical(f"{path}.weight", layout) for layout in ("native", "microsoft"))
        for name in (f"{path}.weight", native, microsoft):
            found = set(_possible_paths("base_model.model." + name.removesuffix(".weight")))
            assert found & {known for known, _ in model.named_modules()} == {path}, name


def test_all_that_does_not_fit_is_listed_and_nothing_is_merged(
    model: Florence2Model, small_folder: Path, tmp_path: Path
) -> None:
    good = matrices(model.get_submodule(LINEAR), 3)
    other, conv = "language_model.encoder.layers.0.fc2", "vision_tower.blocks.0.0.spatial_block.conv1"
    a, b = good.values()
    tensors = {
        f"{LINEAR}.lora_A.weight": a,
        f"{LINEAR}.lora_B.weight": b,
        f"base_model.model.model.{LINEAR}.lora_A.weight": a,
        f"{other}.lora_A.weight": torch.ones(4, 5),
        "language_model.encoder.layers.7.fc1.lora_A.weight": a,
        f"{conv}.fn.dw.lora_A.weight": torch.ones(3, 1, 3, 3),
        f"{LINEAR}.lora_magnitude_vector.weight": torch.ones(3),
        "language_model.model.shared.lora_embedding_A": a,
        "language_model.something.weight": torch.ones(3),
        "language_model.encoder.layers.0.final_layer_norm.bias": torch.ones(5),
        "language_model.model.encoder.embed_positions.lora_embedding_A": a,
    }
    with pytest.raises(CheckpointError) as error:
        merge_adapter(model, write(tmp_path, tensors))
    text = str(error.value)
    for words in [
        "nothing was merged",
        f"base_model.model.model.{LINEAR}.lora_A.weight belong to the same module",
        f"{other}.lora_A.weight is [4, 5], should be [3, {model.get_submodule(other).in_features}]",
        f"{other} has only some of",
        "layers.7.fc1.lora_A.weight belongs to a module that this model does not have",
        "conv1.fn.dw.lora_A.weight belongs to a DepthwiseConv, into which it cannot be merged",
        "lora_magnitude_vector.weight belongs to DoRA, but use_dora is false",
        "shared.lora_embedding_A is [3, 64], should be [3, 51289]",
        "something.weight is neither a LoRA matrix nor a tensor of this model",
        "layer_norm.bias is [5], should be",
        "embed_positions.lora_embedding_A belongs to a Positions, into which it cannot be merged",
    ]:
        assert words in text, words
    assert unchanged(model, small_folder)


def head_adapter(folder: Path, model: Florence2Model, base: Tensor) -> Path:
    """As the common recipes leave it: output projection and more, with the projection's weight before training."""
    rows, width = model.language_model.shared.weight.shape
    generator = torch.Generator().manual_seed(8)
    head = {
        "language_model.lm_head.lora_A.weight": torch.randn(2, width, generator=generator),
        "language_model.lm_head.lora_B.weight": torch.randn(rows, 2, generator=generator),
        "language_model.lm_head.base_layer.weight": base,
    }
    other = matrices(model.get_submodule(LINEAR), 2)
    head |= {f"{MICROSOFT[LINEAR]}.{part}": matrix for part, matrix in other.items()}
    named = {f"base_model.model.{name}": tensor for name, tensor in head.items()}
    return write(folder, named, r=2, lora_alpha=2, use_rslora=True, init_lora_weights="gaussian")


@pytest.mark.release
def test_an_adapter_of_the_output_projection_leaves_the_embedding(small_folder: Path, tmp_path: Path) -> None:
    f, before = florence2.load(small_folder), load_model(small_folder)
    embedding = before.language_model.shared.weight.detach()
    folder = head_adapter(tmp_path / "adapter", before, embedding.half())
    hidden = torch.randn(1, 4, embedding.shape[1])
    merge_adapter(f.model, folder)
    a, b = (
        load_file(folder / "adapter_model.safetensors")[f"base_model.model.language_model.lm_head.lora_{x}.weight"]
        for x in "AB"
    )
    expected = before.logits(hidden) + 2 / math.sqrt(2) * (hidden @ a.T) @ b.T
    torch.testing.assert_close(f.model.logits(hidden), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(f.model.language_model.shared.weight, embedding)
    memory = torch.randn(1, 9, embedding.shape[1])
    options = f.options(num_beams=2, max_new_tokens=6)
    plain = florence2.load(small_folder, adapter=folder, attention="eager").model
    packed, stepped = (florence2.generate(model, memory, options) for model in (f.model, plain))
    unadapted = florence2.generate(before, memory, options)
    assert packed.sequences.tolist() == stepped.sequences.tolist() != unadapted.sequences.tolist()
    for layout in ("microsoft", "native"):
        if layout == "native":
            f.model.final_logits_bias.zero_()  # it has no place there
        f.save(tmp_path / layout, layout)
        again = florence2.load(tmp_path / layout).model
        assert torch.equal(again.output_weight[: len(embedding)], f.model.output_weight)
        assert torch.equal(again.language_model.shared.weight[: len(embedding)], embedding)


def test_an_adapter_of_another_checkpoint_is_refused(small_folder: Path, model: Florence2Model, tmp_path: Path) -> None:
    base = model.language_model.shared.weight.detach().clone()
    base[7, 3] += 0.5
    with pytest.raises(CheckpointError, match=r"lm_head\.base_layer\.weight is not the weight of this model"):
        merge_adapter(model, head_adapter(tmp_path, model, base))
    assert unchanged(model, small_folder)


def unchanged(model: Florence2Model, folder: Path) -> bool:
    before = load_model(folder, dtype=model.dtype).state_dict()
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e5])
def test_a_weight_that_becomes_infinite_spoils_no_other(value: float, small_folder: Path, tmp_path: Path) -> None:
    """1e5 is finite, but not as float16. The linear map comes first and would be merged by then."""
    model = load_model(small_folder, dtype=torch.float16)
    last = "language_model.decoder.layers.0.fc2"
    tensors = {f"{path}.{p}": m for path in (LINEAR, last) for p, m in matrices(model.get_submodule(path), 3).items()}
    tensors[f"{last}.lora_B.weight"][0, 0] = value
    with pytest.raises(
        CheckpointError, match=r"once merged, language_model\.decoder\.layers\.0\.fc2\.weight is not finite"
    ):
        merge_adapter(model, write(tmp_path, tensors))
    assert unchanged(model, small_folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "is of the type 'IA3'; only LORA can be merged"),
        ({"use_dora": "yes"}, "adapter.use_dora must be bool, not 'yes'"),
        ({"bias": "some"}, "adapter.bias is 'some'; only 'none', 'all' and 'lora_only' are implemented"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        (
            {"init_lora_weights": "pissa"},
            "'pissa'; only True, False, 'gaussian', 'eva' and 'orthogonal' are implemented",
        ),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]; only None is implemented"),
        ({"something_new": 1}, "something_new is an unknown field"),
        ({"r": 0}, "every rank must be at least 1"),
        ({"rank_pattern": {"fc1": -2}}, "rank_pattern.fc1 must be a number from 0 to 2**53"),
        ({"r": "8"}, "adapter.r must be int, not '8'"),
        ({"lora_alpha": None}, "adapter.lora_alpha must be float, not None"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern has the pattern '('; write names of modules"),
        ({"alpha_pattern": {"(a*)*b": 4}}, "has the pattern '(a*)*b'"),
        ({"alpha_pattern": ["fc1"]}, "alpha_pattern must be dict"),
    ],
)
def test_what_is_not_plain_lora_is_refused(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    write(tmp_path, {"x.lora_A.weight": torch.ones(1)}, **changes)
    with pytest.raises(ConfigError) as error:
        read_adapter_config(tmp_path)
    assert words in str(error.value)


def test_what_changes_nothing_is_let_through(tmp_path: Path) -> None:
    off = {"use_dora": False, "modules_to_save": None, "rank_pattern": None, "init_lora_weights": "gaussian"}
    inert = {"lora_dropout": 0.1, "base_model_name_or_path": "someone/model", "task_type": "CAUSAL_LM", "newer": None}
    config = read_adapter_config(write(tmp_path, {"x": torch.ones(1)}, **off, **inert))
    assert (config.rank, config.alpha, config.rslora, config.ranks) == (3, 12.0, False, {})


HOSTILE = [
    "(|.)" * 38 + "x",
    "(a|a)" * 38,
    "(.|.)(.|.)x",
    ".*.*.*x",
    ".*.+.*.+x",
    ".?" * 60 + "x",
    "(a*)*b",
    "((a))",
    "a{1,999}",
    "(?:a)",
    "(?=a)",
    r"\w+\w+x",
    r"(a)\1",
    r"\d+" * 4,
    "[^a]b",
    "a" * 201 + "*",
    "",
    "a|b",
]


@pytest.mark.parametrize(
    ("most", "beyond"),
    [
        ("(a|b).(c|d)", "(a|b).(c|d).(e|f)"),
        (r".*a.*", r".*a.*b.*"),
        (r"\d+a\d+b\d+", r"\d+a\d+b\d+c\d+"),
        (f"{'a' * 198}.*", f"{'a' * 199}.*"),
    ],
)
def test_patterns_have_few_parts_that_vary(most: str, beyond: str) -> None:
    assert _is_harmless(most) and not _is_harmless(beyond)


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_might_never_end_are_refused(pattern: str, key: str, tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.ones(1)}, **{key: {pattern: 3}})
    with pytest.raises(ConfigError, match=f"{key} has the pattern .*write names of modules"):
        read_adapter_config(tmp_path)


def test_a_pattern_cannot_stop_the_clock(tmp_path: Path) -> None:
    """As many as may be, each as slow as may be, on every module of a large model."""
    patterns = {f".*{letter}.*[a-z](a|b){letter}\\d+\\d+x": 3 for letter in "abcdefghijklmnop"}
    config = read_adapter_config(write(tmp_path, {"x": torch.ones(1)}, rank_pattern=patterns))
    start = time.process_time()
    for layer in range(300):
        config.rank_of(
            f"base_model.model.vision_tower.blocks.2.{layer}.spatial_block.window_attn.fn.qkv.and.more.of.it"
        )
    assert time.process_time() - start < 5


def test_names_and_patterns_have_limits(tmp_path: Path) -> None:
    """A rank for each module is usual, for each of a million is not."""
    names = {f"layers.{layer}.fc1": 2 for layer in range(MAX_NAMES)}
    config = read_adapter_config(write(tmp_path, {"x": torch.ones(1)}, rank_pattern=names))
    assert config.rank_of("encoder.layers.777.fc1") == 2 and config.rank_of("encoder.layers.777.fc2") == 3
    some = {f"fc{layer}.*": 2 for layer in range(MAX_PATTERNS)}
    assert len(read_adapter_config(write(tmp_path, {"x": torch.ones(1)}, rank_pattern=some)).ranks) == MAX_PATTERNS
    for more in (names | {"one": 2}, {f"fc{layer}.*": 2 for layer in range(MAX_PATTERNS + 1)}):
        with pytest.raises(ConfigError, match=r"the limits are 10,000 and 16"):
            read_adapter_config(write(tmp_path, {"x": torch.ones(1)}, rank_pattern=more))


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -1.0, "1", True, None, [1]])
@pytest.mark.parametrize("key", ["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
def test_numbers_that_are_none_get_a_sentence(key: str, value: object, tmp_path: Path) -> None:
    changes = {key: {"fc1": value} if key.endswith("pattern") else value}
    with pytest.raises(ConfigError, match=f"{key}.* must be ") as error:
        read_adapter_config(write(tmp_path, {"x": torch.ones(1)}, **changes))
    assert len(str(error.value)) < 500


def test_deep_json_gets_a_sentence(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.ones(1)})
    (tmp_path / "adapter_config.json").write_text('{"peft_type": ' + "[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_adapter_config(tmp_path)


def test_folders_that_hold_no_adapter(model: Florence2Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not an adapter: it holds no adapter_config\.json"):
        merge_adapter(model, tmp_path)
    write(tmp_path, {"x": torch.ones(1)})
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="load it with peft and save it again"):
        merge_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not this")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        merge_adapter(model, tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="it holds no matrices"):
        merge_adapter(model, tmp_path)


def test_load_and_convert_merge_the_same(small_folder: Path, model: Florence2Model, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", model, MICROSOFT)
    loaded = florence2.load(small_folder, adapter=folder).model
    convert_checkpoint(small_folder, tmp_path / "merged", adapter=folder)
    stored = load_model(tmp_path / "merged").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in loaded.state_dict().items())
    assert not unchanged(loaded, small_folder)


def test_the_command_line(
    small_folder: Path, model: Florence2Model, tmp_path: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path / "adapter", model, CANONICAL)
    assert main(["convert", str(small_folder), str(tmp_path / "merged"), "--adapter", str(folder)]) == 0
    assert load_file(tmp_path / "merged" / "model.safetensors")
    common = [str(picture_file), "--max-new-tokens", "8"]
    capsys.readouterr()
    assert main(["run", "<OD>", *common, "--model", str(tmp_path / "merged"), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    run = ["run", "<OD>", *common, "--model", str(small_folder), "--out", str(tmp_path / "out")]
    assert main([*run, "--adapter", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert main(run) == 2
    assert f"adapter was {str(folder)!r} and is None" in capsys.readouterr().err
    assert main([*run, "--adapter", "no/such/place"]) == 2
    assert main(["cascade", *common, "--model", str(small_folder), "--adapter", str(tmp_path)]) == 2
    assert "is not an adapter" in capsys.readouterr().err


def test_a_name_that_is_none_is_never_looked_up() -> None:
    with pytest.raises(florence2.Florence2Error, match="not an existing path: .*not a Hub id OWNER/NAME"):
        resolve_adapter("a/b/c")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_may_be_named_by_one_of_its_files(
    file: str, small_folder: Path, model: Florence2Model, picture_file: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "adapter", model, CANONICAL)
    write_tasks(folder, TaskTable([token_task("<VQA>")]))
    assert resolve_adapter(folder / file) == find_adapter(str(folder / file)) == folder
    merged = florence2.load(small_folder, adapter=folder)
    named = florence2.load(small_folder, adapter=folder / file)
    merge_adapter(model, folder / file)
    expected = merged.model.state_dict()
    for one in (named.model, model):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in one.state_dict().items())
    assert named.processor.tasks.own == merged.processor.tasks.own
    convert_checkpoint(small_folder, tmp_path / "whole", adapter=folder / file)
    assert florence2.load(tmp_path / "whole").processor.tasks.own == merged.processor.tasks.own
    words = ["run", "<VQA>why?", str(picture_file), "--model", str(small_folder), "--max-new-tokens", "3"]
    assert main([*words, "--adapter", str(folder / file)]) == 0


def test_another_file_is_not_an_adapter(
    small_folder: Path, model: Florence2Model, picture_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path / "adapter", model, CANONICAL)
    other = (folder / "adapter_model.safetensors").rename(folder / "mine.safetensors")
    words = "mine.safetensors is a file; give the folder that holds adapter_config.json and adapter_model.safetensors"
    with pytest.raises(ConfigError, match=words):
        florence2.load(small_folder, adapter=other)
    with pytest.raises(ConfigError, match=words):
        merge_adapter(model, other)
    assert main(["run", "od", str(picture_file), "--model", str(small_folder), "--adapter", str(other)]) == 2
    assert words in capsys.readouterr().err
    pickled = folder / "adapter_model.bin"
    pickled.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="has no adapter_model.safetensors; if it holds an adapter_model.bin"):
        florence2.load(small_folder, adapter=pickled)
