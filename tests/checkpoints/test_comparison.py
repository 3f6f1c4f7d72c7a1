"""What a checkpoint would lose is refused by name, before anything is written."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

import florence2
from florence2 import Florence2
from florence2.checkpoints.checkpoint import load_model, save_checkpoint
from florence2.checkpoints.tensors import find_weights
from florence2.errors import CheckpointError, ConfigError, OptionError
from florence2.fast.install import uninstall
from florence2.model.attention import relu
from florence2.model.config import change_config
from florence2.model.davit import Mlp
from florence2.model.florence2 import Head
from florence2.processor import Processor
from florence2.train.gradient_checkpointing import gradient_checkpointing
from tests.checkpoints.prepared import Tower, insert_adapters, make_louder, prune_heads


@pytest.fixture
def f(mini: Florence2) -> Florence2:
    return Florence2(copy.deepcopy(mini.model), mini.processor)


def first(model: Any) -> Any:
    return model.language_model.decoder.layers[0]


def block(model: Any) -> Any:
    return model.vision_tower.blocks[1][0]


def keep_layers(model: Any, *indices: int) -> None:
    layers = model.language_model.decoder.layers
    model.language_model.decoder.layers = nn.ModuleList([layers[i] for i in indices])


class Scaled(nn.Module):
    """A module with a setting of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._factor = 1.0


def insert_scaled(model: Any) -> None:
    model.language_model.decoder.scaled = Scaled()


def bias_as_parameter(model: Any) -> None:
    del model.final_logits_bias
    model.final_logits_bias = nn.Parameter(torch.ones(1, 3))


def multiply(factor: float) -> Callable[..., Tensor]:
    return lambda module, inputs, out: out * factor


LAYER, BLOCK = "language_model.decoder.layers.0", "vision_tower.blocks.1.0"
REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "activation": (lambda m: setattr(first(m), "activation", F.silu), f"{LAYER}.activation is silu, not gelu"),
    "activation of the tower": (
        lambda m: setattr(block(m).channel_block.ffn, "activation", F.relu),
        f"{BLOCK}.channel_block.ffn.activation is relu, not gelu",
    ),
    "activation as a module": (
        lambda m: setattr(first(m), "activation", nn.SiLU()),
        f"{LAYER}.activation, a module of the class SiLU, is not described",
    ),
    "window": (
        lambda m: setattr(block(m).spatial_block.window_attn, "window", 8),
        f"{BLOCK}.spatial_block.window_attn.window is 8, not 4",
    ),
    "groups": (
        lambda m: setattr(block(m).channel_block.channel_attn, "groups", 1),
        f"{BLOCK}.channel_block.channel_attn.groups is 1, not 4",
    ),
    "heads": (lambda m: setattr(first(m).self_attn, "heads", 2), f"{LAYER}.self_attn.heads is 2, not 4"),
    "eps": (
        lambda m: setattr(first(m).final_layer_norm, "eps", 0.1),
        f"{LAYER}.final_layer_norm.eps is 0.1, not 1e-05",
    ),
    "dropout": (lambda m: setattr(first(m), "dropout", 0.5), f"{LAYER}.dropout is 0.5, not 0.0"),
    "attention dropout": (lambda m: setattr(first(m).self_attn, "dropout", 0.5), "self_attn.dropout is 0.5, not 0.0"),
    "stochastic depth": (
        lambda m: setattr(block(m).spatial_block, "drop_path_rate", 0.9),
        f"{BLOCK}.spatial_block.drop_path_rate is 0.9, not ",
    ),
    "added module without tensors": (
        insert_scaled,
        "language_model.decoder.scaled, a module of the class Scaled, is not",
    ),
    "scale": (
        lambda m: setattr(m.language_model.decoder, "scale", 3.0),
        "language_model.decoder.scale is 3.0, not 1.0",
    ),
    "stride": (
        lambda m: setattr(m.vision_tower.convs[1].conv, "stride", (1, 1)),
        r"convs.1.conv.stride is \(1, 1\), not",
    ),
    "pooling": (
        lambda m: setattr(m.multi_modal_projector, "sources", ("last_frame",)),
        r"multi_modal_projector.sources is \('last_frame',\), not \('spatial_avg_pool', 'temporal_avg_pool'\)",
    ),
    "subclass": (make_louder, f"{LAYER} is of the class LouderLayer, not DecoderLayer"),
    "subclass of the model": (
        lambda m: setattr(m, "__class__", type("Mine", (type(m),), {})),
        "the model is of the class Mine, not Florence2Model",
    ),
    "norm left out": (
        lambda m: setattr(first(m), "final_layer_norm", nn.Identity()),
        f"{LAYER}.final_layer_norm is of the class Identity, not LayerNorm",
    ),
    "adapters": (insert_adapters, f"{LAYER}.adapter, a module of the class Adapter, is not described"),
    "tower": (lambda m: setattr(m, "vision_tower", Tower(32)), "vision_tower is of the class Tower, not DaViT"),
    "pruned heads": (prune_heads, rf"{LAYER}.self_attn.q_proj.weight is \[16, 32\], not \[32, 32\]"),
    "layer left out": (lambda m: keep_layers(m, 1), "language_model.decoder.layers.1 is missing"),
    "layer repeated": (
        lambda m: keep_layers(m, 0, 1, 1),
        "layers.2, a module of the class DecoderLayer, is not described",
    ),
    "layer shared": (
        lambda m: keep_layers(m, 0, 0),
        r"nothing was written:\n  language_model.decoder.layers.1 is the same as language_model.decoder.layers.0\n[^ ]",
    ),
    "tensor shared": (
        lambda m: setattr(first(m).fc1, "weight", m.language_model.decoder.layers[1].fc1.weight),
        r"layers.1.fc1.weight is the same as language_model.decoder.layers.0.fc1.weight",
    ),
    "bias left out": (lambda m: setattr(first(m).fc1, "bias", None), f"{LAYER}.fc1.bias is missing"),
    "parameter added": (
        lambda m: setattr(first(m), "gate", nn.Parameter(torch.ones(3))),
        rf"{LAYER}.gate \[3\], a parameter, is not described",
    ),
    "buffer added": (
        lambda m: first(m).register_buffer("shift", torch.ones(3), persistent=False),
        rf"{LAYER}.shift \[3\], a non-persistent buffer, is not described",
    ),
    "parameter as buffer": (
        bias_as_parameter,
        "final_logits_bias is a parameter, not a buffer",
    ),
    "parametrised": (
        lambda m: nn.utils.parametrizations.weight_norm(first(m).fc1),
        f"{LAYER}.fc1 is of the class ParametrizedLinear, not Linear",
    ),
    "larger table": (
        lambda m: setattr(m.language_model.shared, "weight", nn.Parameter(torch.ones(900, 32))),
        r"language_model.shared.weight is \[900, 32\], not ",
    ),
    "forward replaced": (
        lambda m: setattr(first(m), "forward", lambda x, past, memory, trace: x),
        f"{LAYER}.forward was replaced on this instance",
    ),
    "method replaced": (
        lambda m: setattr(m, "logits", lambda hidden, trace: hidden),
        "model.logits was replaced on this",
    ),
    "forward hook": (
        lambda m: first(m).fc2.register_forward_hook(multiply(2)),
        f"{LAYER}.fc2 has another forward hook than described: multiply.<locals>.<lambda>",
    ),
    "pre-hook": (
        lambda m: m.language_model.shared.register_forward_pre_hook(lambda module, inputs: None),
        "language_model.shared has another forward pre-hook than described",
    ),
    "backward hook": (
        lambda m: first(m).register_full_backward_hook(lambda module, inputs, outputs: None),
        f"{LAYER} has another backward hook than described",
    ),
    "output projection of its own": (
        lambda m: setattr(m, "lm_head", Head(torch.ones(m.config.text.vocab_size, 32))),
        "lm_head, a module of the class Head, is not described",
    ),
    "several types": (lambda m: first(m).double(), r"weights of several types \(torch.float32, torch.float64\)"),
    "complex numbers": (
        lambda m: setattr(first(m).fc1, "weight", nn.Parameter(first(m).fc1.weight.to(torch.complex64))),
        f"{LAYER}.fc1.weight is of type torch.complex64, not torch.float32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_by_name(f: Florence2, tmp_path: Path, name: str) -> None:
    change, words = REFUSED[name]
    change(f.model)
    with pytest.raises(CheckpointError, match=words):
        f.save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_everything_is_named_at_once_with_the_remedy(f: Florence2, tmp_path: Path) -> None:
    for name in ("activation", "window", "adapters", "norm left out"):
        REFUSED[name][0](f.model)
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(f.model, tmp_path / "c")
    text = str(error.value)
    for line in (
        "activation is silu",
        "window is 8",
        "the class Adapter",
        "Identity",
        "changes={",
        "prepare=",
        "torch.save",
    ):
        assert line in text
    assert "adapter.down" not in text and "not one that its" not in text  # a foreign module is named once


@pytest.fixture
def patched_class(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Mlp.forward
    monkeypatch.setattr(Mlp, "forward", lambda self, x, trace: 2 * original(self, x, trace))


@pytest.mark.usefixtures("patched_class")
def test_a_method_replaced_on_a_class(f: Florence2, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the method Mlp\.forward was replaced on its class"):
        f.save(tmp_path / "c")


@pytest.fixture
def hook_on_all_modules() -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, inputs, out: None)
    yield
    handle.remove()


@pytest.mark.usefixtures("hook_on_all_modules")
def test_a_hook_on_all_modules(f: Florence2, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="torch runs global_forward_hooks on every module"):
        f.save(tmp_path / "c")


@pytest.mark.parametrize(
    "harmless",
    [
        lambda m: m.train(),
        lambda m: m.requires_grad_(False),
        lambda m: uninstall(m),
        lambda m: setattr(first(m), "note", "seen"),
        lambda m: setattr(first(m).self_attn, "attention", "eager"),
        lambda m: keep_layers(m, 1, 0),
    ],
    ids=["training", "frozen", "plain", "a note", "written out", "reordered"],
)
def test_what_comes_back_or_does_not_matter(f: Florence2, tmp_path: Path, harmless: Callable[[Any], object]) -> None:
    harmless(f.model)
    f.save(tmp_path / "c")
    again = load_model(tmp_path / "c").state_dict()
    assert all(torch.equal(again[name], value) for name, value in f.model.state_dict().items())


def test_a_model_in_gradient_checkpointing_can_be_saved(f: Florence2, tmp_path: Path) -> None:
    with gradient_checkpointing(f.model):
        f.save(tmp_path / "c")
        first(f.model).forward = partial(torch.utils.checkpoint.checkpoint, lambda *inputs: inputs[0])
        with pytest.raises(CheckpointError, match="forward was replaced"):
            f.save(tmp_path / "d")


def test_the_configuration_may_follow_the_model(f: Florence2, tmp_path: Path) -> None:
    """One layer left out, or another window, is a change of a setting: with `model.config` changed, it comes back."""
    keep_layers(f.model, 1)
    f.model.config = change_config(f.model.config, {"text.decoder_layers": 1})
    f.save(tmp_path / "c")
    assert len(florence2.load(tmp_path / "c").model.language_model.decoder.layers) == 1
    f.model.config = change_config(f.model.config, {"generation.num_beams": 0})
    with pytest.raises(CheckpointError, match="generation settings cannot be used"):
        f.save(tmp_path / "d")


# ---- the function that a model was prepared with --------------------------------------------------------------------


def hook_by(factor: float) -> Callable[[Any], None]:
    return lambda model: first(model).fc2.register_forward_hook(multiply(factor)) and None


def steer(vector: Tensor) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        first(model).fc2.register_forward_hook(lambda module, inputs, out: out + vector)

    return prepare


def test_hooks_are_compared_by_what_they_do(f: Florence2, tmp_path: Path) -> None:
    hook_by(1.5)(f.model)
    f.save(tmp_path / "same", prepare=hook_by(1.5))
    with pytest.raises(CheckpointError, match="another forward hook than described"):
        f.save(tmp_path / "other", prepare=hook_by(2.0))
    with pytest.raises(CheckpointError, match="another forward hook than described"):
        f.save(tmp_path / "other", prepare=lambda model: None)


def test_tensors_in_hooks_are_compared(f: Florence2, tmp_path: Path) -> None:
    steer(torch.ones(32))(f.model)
    f.save(tmp_path / "same", prepare=steer(torch.ones(32)))
    with pytest.raises(CheckpointError, match="another forward hook than described"):
        f.save(tmp_path / "other", prepare=steer(torch.zeros(32)))


def test_the_function_of_loading_is_remembered(f: Florence2, tmp_path: Path) -> None:
    hook_by(1.5)(f.model)
    f.save(tmp_path / "a", prepare=hook_by(1.5))
    again = florence2.load(tmp_path / "a", prepare=hook_by(1.5))
    again.save(tmp_path / "b")
    first(again.model).fc2._forward_hooks.clear()
    with pytest.raises(CheckpointError, match="another forward hook than described: none"):
        again.save(tmp_path / "c")


def test_loading_a_function_that_adds_no_tensors(mini: Florence2, mini_folder: Path) -> None:
    """A published checkpoint can be loaded with one."""
    model = florence2.load(mini_folder, prepare=hook_by(1.5)).model
    assert len(first(model).fc2._forward_hooks) == 1
    assert torch.equal(first(model).fc2.weight, first(mini.model).fc2.weight)


def test_settings_of_added_modules_are_compared(f: Florence2, tmp_path: Path) -> None:
    insert_scaled(f.model)
    f.save(tmp_path / "same", prepare=insert_scaled)
    f.model.language_model.decoder.scaled._factor = 2.0  # type: ignore[assignment, union-attr]
    with pytest.raises(CheckpointError, match=r"decoder\.scaled\._factor is 2\.0, not 1\.0"):
        f.save(tmp_path / "other", prepare=insert_scaled)


class Noise(nn.Module):
    """Buffers that are not stored: random, and on the device where the module is made."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.register_buffer("noise", torch.randn(3, device=device), persistent=False)


def add_noise(model: Any) -> None:
    model.noise = Noise()


def test_random_buffers_come_back_and_leave_the_random_state_alone(mini_folder: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    one, other = (florence2.load(mini_folder, prepare=add_noise) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.model.noise.noise, other.model.noise.noise)  # type: ignore[union-attr]
    one.save(tmp_path / "same")
    one.model.noise.noise += 1  # type: ignore[operator, union-attr]
    with pytest.raises(
        CheckpointError, match="noise.noise has other values than described, and no checkpoint holds it"
    ):
        one.save(tmp_path / "other")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda m: setattr(m, "lm_head", Head(torch.ones(3, 32))), r"prepare adds lm_head\.weight; a checkpoint keeps"),
        (
            lambda m: setattr(m.language_model.encoder, "embed_tokens", nn.Embedding(3, 32)),
            r"prepare adds language_model\.encoder\.embed_tokens\.weight; a checkpoint keeps this name",
        ),
        (lambda m: setattr(m, "noise", Noise("meta")), "leaves noise.noise on the meta device"),
    ],
)
def test_what_no_checkpoint_can_hold(mini_folder: Path, prepare: Callable[[Any], None], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        florence2.load(mini_folder, prepare=prepare)


def test_wrong_arguments(f: Florence2, mini_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="prepare is 'insert'; it must be a function"):
        florence2.load(mini_folder, prepare="insert")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="layout is 'other'; it must be microsoft or native"):
        f.save(tmp_path / "c", "other")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="dtype is 'int8'; it must be one of float32"):
        f.save(tmp_path / "c", dtype="int8")
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        f.save(mini_folder)
    with pytest.raises(CheckpointError, match="final_logits_bias is not zero everywhere, and the native layout"):
        f.save(tmp_path / "c", "native")
    f.model.config = change_config(f.model.config, {"vision.activation_function": "relu"})
    for part in f.model.modules():
        if isinstance(part, Mlp):
            part.activation = relu
    with pytest.raises(ConfigError, match="activation_function other than gelu has no place in Microsoft's layout"):
        f.save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "float64"])
def test_the_stored_type(f: Florence2, tmp_path: Path, dtype: Any) -> None:
    f.save(tmp_path / "c", dtype=dtype)
    stored = find_weights(tmp_path / "c").read_headers()
    assert {str(info.dtype).removeprefix("torch.") for info in stored.values()} == {str(dtype).removeprefix("torch.")}


def test_image_settings_and_tokenizer_come_from_the_object(f: Florence2, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        f.processor.image_config,
        height=96,
        width=64,
        mean=(0.1, 0.2, 0.3),
        resample=2,
        rescale_factor=0.5,
        image_seq_length=97,
    )
    changed = Florence2(f.model, Processor(f.processor.tokenizer, settings))
    changed.save(tmp_path / "c")
    again = florence2.load(tmp_path / "c")
    assert again.processor.image_config == settings
    assert again.processor.prompt("<OD>") == f.processor.prompt("<OD>")
    assert again.processor.tokenizer.vocab_size == f.processor.tokenizer.vocab_size
