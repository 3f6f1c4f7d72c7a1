"""Which way each part goes, and every reason why it goes the plain one, in words."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import florence2
from florence2 import Florence2, explain_path
from florence2.fast import bands, linear, packed
from florence2.fast.cuda import convolutions
from florence2.fast.cuda.recorded import graphs
from florence2.fast.install import FastFlorence2Model, install, uninstall
from florence2.fast.unchanged import find_change, is_unchanged
from florence2.model.bart import Decoder
from florence2.model.davit import ChannelBlock, Mlp
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import NO_TRACE


@pytest.fixture(autouse=True)
def _everything_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_measure_gain", lambda weights, rows: 2.0)
    monkeypatch.setattr(packed, "_gains", {})
    monkeypatch.setattr(linear, "_chosen", {})


@pytest.fixture
def f(mini: Florence2) -> Florence2:
    return Florence2(copy.deepcopy(mini.model), mini.processor)


def lines(f: Any, num_beams: int | None = None) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in explain_path(f, num_beams).splitlines())


def test_an_unchanged_model(f: Florence2) -> None:
    assert lines(f) == {
        "vision tower": "all 4 blocks by bands",
        "convolutions": "plain: the model is on cpu (10)",
        "text layers": "plain: the model is on cpu (4)",
        "linear maps": "measured routine for 49; chosen so far, by shape: none yet",
        "decoder's layers": "all 2 computed without calling their modules",
        "decoder's steps": "17 of 17 weights packed for 3 rows",
        "weights laid out": "none: the model is on cpu",
        "CUDA graphs": "none: the model is on cpu",
    }
    assert lines(f, 1)["decoder's steps"] == "17 of 17 weights packed for 1 row"


def test_what_it_says_is_what_happens(f: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines are made without packing anything; the next run packs as many weights and bands as many blocks."""
    banded: list[object] = []
    add_rest = bands._add_rest

    def count(block: Any, x: Tensor) -> Tensor:
        banded.append(block)
        return add_rest(block, x)

    monkeypatch.setattr(bands, "_add_rest", count)
    blocks: Any = f.model.vision_tower.blocks
    blocks[0][0].channel_block.channel_attn.register_forward_hook(lambda *_: None)
    path = "vision_tower.blocks.0.0.channel_block.channel_attn"
    assert lines(f)["vision tower"] == f"3 of 4 blocks by bands; plain: {path} has a forward hook"
    assert lines(f, 2)["decoder's steps"] == "17 of 17 weights packed for 2 rows"
    assert f.model not in packed._kept
    f.run("<OD>", noise(), num_beams=2, max_new_tokens=2)
    assert len(banded) == 3 and sum(len(copy.weights) for copy in packed._kept[f.model].values()) == 17
    chosen = lines(f)["linear maps"]
    counts = [int(count) for count in re.findall(r"for (\d+)", chosen)]
    assert counts[0] == 49 and sum(counts[1:]) == len(linear._chosen) > 0 and "none yet" not in chosen


def noise() -> Any:
    return torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(1)).mul(255).byte().permute(1, 2, 0).numpy()


class Louder(ChannelBlock):
    """A block that somebody wrote."""


class Tower(nn.Module):
    """A tower without blocks of this package."""


class OwnMlp(Mlp):
    """A part that somebody wrote."""


def block_of(f: Florence2) -> Any:
    return f.model.vision_tower.blocks[1][0].channel_block


BLOCK = "vision_tower.blocks.1.0.channel_block"


def shadow(part: Any, name: str) -> None:
    setattr(part, name, getattr(part, name))


def become(part: Any, kind: type) -> None:
    part.__class__ = kind


BLOCKS: dict[str, tuple[Callable[[Florence2], object], str]] = {
    "hook": (
        lambda f: block_of(f).ffn.fc1.register_forward_hook(lambda *_: None),
        f"3 of 4 blocks by bands; plain: {BLOCK}.ffn.fc1 has a forward hook",
    ),
    "pre-hook": (
        lambda f: block_of(f).register_forward_pre_hook(lambda *_: None),
        f"3 of 4 blocks by bands; plain: {BLOCK} has a forward hook",
    ),
    "training": (
        lambda f: block_of(f).norm1.train(),
        f"3 of 4 blocks by bands; plain: {BLOCK}.norm1 is in training mode",
    ),
    "class of a part": (
        lambda f: become(block_of(f).ffn, OwnMlp),
        f"3 of 4 blocks by bands; plain: {BLOCK}.ffn is of the class OwnMlp, which the faster way does not know",
    ),
    "class of a block": (
        lambda f: become(block_of(f), Louder),
        f"3 of 4 blocks by bands; plain: {BLOCK} is of the class Louder, which the faster way does not know",
    ),
    "method": (
        lambda f: shadow(block_of(f), "_drop_path"),
        f"3 of 4 blocks by bands; plain: {BLOCK} has a replaced method, _drop_path",
    ),
    "eager block": (
        lambda f: setattr(block_of(f), "attention", "eager"),
        "3 of 4 blocks by bands; plain: eager attention was asked for",
    ),
    "own tower": (
        lambda f: setattr(f.model, "vision_tower", Tower()),
        "plain: vision_tower is of the class Tower, which has no blocks of this package",
    ),
    "uninstalled": (
        lambda f: uninstall(f.model),
        "plain: florence2.fast.install.install(model) was not called (4)",
    ),
    "training of all": (
        lambda f: f.model.train(),
        "plain: vision_tower.blocks.0.0.spatial_block is in training mode, "
        "vision_tower.blocks.0.0.channel_block is in training mode, "
        "vision_tower.blocks.1.0.spatial_block is in training mode, and 1 more",
    ),
}


@pytest.mark.parametrize("change", BLOCKS)
def test_reasons_of_blocks(f: Florence2, change: str) -> None:
    BLOCKS[change][0](f)
    assert lines(f)["vision tower"] == BLOCKS[change][1]


def test_traces_and_patches_of_this_thread(f: Florence2) -> None:
    traced = "3 of 4 blocks by bands; plain: a trace or patch looks into it"
    with f.trace("vision_tower.blocks.0.0.spatial_block.ffn"):
        assert lines(f)["vision tower"] == traced
    with f.patched({"vision_tower.blocks.0.0.spatial_block.ffn": lambda x: x}):  # without a warning: no run took place
        assert lines(f)["vision tower"] == traced
    with f.trace("memory"):
        assert lines(f)["vision tower"] == "all 4 blocks by bands"
        assert lines(f)["CUDA graphs"] == "none: a trace or patch is in force"


def test_reasons_that_hold_everywhere(f: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert lines(f)["vision tower"] == "plain: a forward hook is registered on all modules (4)"
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert lines(f)["vision tower"] == "plain: autocast is on (4)"
    with monkeypatch.context() as patch:
        patch.setattr(Mlp, "forward", lambda self, x, trace: x)
        assert lines(f)["vision tower"] == "plain: Mlp.forward was replaced (4)"
    assert find_change(f.model.vision_tower, bands._KINDS) == "gradients are on"
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert find_change(f.model.vision_tower, bands._KINDS) == "torch.compile is at work"
        assert linear.why_plain(torch.device("cpu"), torch.float32) == "torch.compile is at work"
    with torch.no_grad():
        block = f.model.get_submodule(BLOCK)
        assert find_change(block, bands._KINDS) is None and is_unchanged(block, bands._KINDS)
        assert find_change(block.train(), bands._KINDS) == "it is in training mode"


def test_eager_attention(mini_folder: Any) -> None:
    eager = lines(florence2.load(mini_folder, attention="eager"))
    assert eager == {
        "vision tower": "plain: eager attention was asked for (4)",
        "convolutions": "plain: eager attention was asked for",
        "text layers": "plain: eager attention was asked for (4)",
        "linear maps": "plain: eager attention was asked for",
        "decoder's layers": "plain: eager attention was asked for",
        "decoder's steps": "plain: eager attention was asked for",
        "weights laid out": "none: eager attention was asked for",
        "CUDA graphs": "none: eager attention was asked for",
    }


def test_a_changed_layer_of_the_decoder(f: Florence2) -> None:
    layers: Any = f.model.language_model.decoder.layers
    layers[1].fc1.register_forward_hook(lambda *_: None)
    assert lines(f)["decoder's layers"] == "plain: language_model.decoder.layers.1.fc1 has a forward hook"
    become(layers[1].fc1, torch.nn.Linear)
    reason = "is of the class Linear, which the faster way does not know"
    assert lines(f)["decoder's layers"] == f"plain: language_model.decoder.layers.1.fc1 {reason}"
    become(f.model.language_model.decoder, type("OwnDecoder", (Decoder,), {}))
    reason = "language_model.decoder is of the class OwnDecoder, which the faster way does not know"
    assert lines(f)["decoder's layers"] == f"plain: {reason}"


def test_a_model_that_is_not_installed(f: Florence2) -> None:
    reason = "florence2.fast.install.install(model) was not called"
    uninstall(f.model)
    assert lines(f)["linear maps"] == lines(f)["decoder's steps"] == f"plain: {reason}"
    assert lines(f)["CUDA graphs"] == f"none: {reason}"


class OwnModel(Florence2Model):
    """A model that somebody wrote."""


def test_a_model_of_ones_own(f: Florence2) -> None:
    become(f.model, OwnModel)
    reason = "the model is of the class OwnModel, which the faster way does not know"
    assert lines(f)["decoder's steps"] == f"plain: {reason}" and lines(f)["CUDA graphs"] == f"none: {reason}"
    assert lines(f)["linear maps"].startswith("measured routine for 49")


def test_parts_that_were_not_loaded(mini_folder: Any) -> None:
    tower = lines(florence2.load(mini_folder, parts="vision"))
    assert tower["vision tower"] == "all 4 blocks by bands" and tower["CUDA graphs"] == "none: the decoder is missing"
    missing = 'the model was loaded with parts="vision"; load it with parts="all".'
    assert tower["decoder's layers"] == tower["decoder's steps"]
    assert tower["decoder's steps"] == f"none. The language model is missing: {missing}"
    plain = florence2.load(mini_folder, parts="vision")
    uninstall(plain.model)
    assert lines(plain)["linear maps"] == "plain: florence2.fast.install.install(model) was not called"


class OwnLinear(nn.Linear):
    """A linear map that somebody wrote."""


def test_linear_maps(f: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = f.model.language_model.decoder.layers[0]
    become(layer.fc1, OwnLinear)
    layer.fc2 = nn.Linear(64, 32)
    path = "language_model.decoder.layers.0"
    own = f"as they are: {path}.fc1 is of the class OwnLinear, {path}.fc2 is a plain nn.Linear"
    assert lines(f)["linear maps"] == f"measured routine for 47; chosen so far, by shape: none yet; {own}"
    assert lines(f)["decoder's steps"].startswith("15 of 15 weights packed")
    monkeypatch.setattr(linear, "_chosen", {(1,): F.linear, (2,): linear.convolve, (3,): F.linear})
    assert "by shape: F.linear for 2, convolution for 1;" in lines(f)["linear maps"]
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        assert lines(f)["linear maps"] == "plain: nn.Linear.forward was replaced"
    monkeypatch.setattr(linear, "_HAS_ONEDNN", False)
    assert lines(f)["linear maps"] == "plain: torch has no oneDNN for this processor"


def test_other_types_and_devices(f: Florence2) -> None:
    cuda = torch.device("cuda")
    with torch.no_grad():
        assert linear.why_plain(cuda, torch.float32) == "the model is on cuda"
        assert bands.why_plain(block_of(f), cuda, NO_TRACE) == "the model is on cuda, and torch finds no CUDA device"
    assert linear.why_plain(torch.device("cpu"), torch.float32) == "gradients are on"
    f.model.to(torch.bfloat16)
    assert lines(f)["linear maps"] == "plain: the weights are bfloat16, not float32"
    assert lines(f)["decoder's steps"] == "plain: bfloat16, not float32 (17)"


def test_weights_of_steps(f: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed.why_unusable([torch.empty(3, 4, device="meta")]) == "on meta"
    assert packed.why_unusable([torch.empty(3, 4, 5)]) == "not a plain matrix"
    assert lines(f, 65)["decoder's steps"] == "plain: a step has 65 rows, and packing gains up to 64"
    assert lines(f)["decoder's steps"] == "17 of 17 weights packed for 3 rows"
    monkeypatch.setattr(packed, "_gains", {})
    monkeypatch.setattr(packed, "_measure_gain", lambda weights, rows: 0.9)
    assert lines(f)["decoder's steps"] == "plain: packing gains too little here (17)"
    monkeypatch.setattr(packed, "is_available", lambda: False)
    missing = "plain: oneDNN's packed products are missing or wrong on this machine"
    assert lines(f)["decoder's steps"] == missing


OWN_TEXT = "language_model is of the class OwnText, which the faster way does not know"
GRAPHS: dict[str, tuple[Callable[[Any], object], str]] = {
    "block": (
        lambda model: model.vision_tower.blocks[0][0].register_forward_hook(lambda *_: None),
        "prompts, steps replayed; images plain: vision_tower.blocks.0.0 has a forward hook",
    ),
    "nothing": (lambda model: None, "images, prompts, steps replayed"),
    "step": (
        lambda model: shadow(model, "step"),
        "images, prompts replayed; steps plain: the model has a replaced method, step",
    ),
    "logits": (
        lambda model: shadow(model, "logits"),
        "images, prompts replayed; steps plain: the model has a replaced method, logits",
    ),
    "hook": (
        lambda model: model.language_model.decoder.layers[0].fc1.register_forward_hook(lambda *_: None),
        "images, prompts replayed; steps plain: language_model.decoder.layers.0.fc1 has a forward hook",
    ),
    "embedding": (
        lambda model: model.language_model.shared.train(),
        "images replayed; prompts plain: language_model.shared is in training mode; "
        "steps plain: language_model.shared is in training mode",
    ),
    "class": (
        lambda model: become(model.language_model, type("OwnText", (type(model.language_model),), {})),
        f"images replayed; prompts plain: {OWN_TEXT}; steps plain: {OWN_TEXT}",
    ),
}


@pytest.mark.parametrize("change", GRAPHS)
def test_graphs_on_a_cuda_device(f: Florence2, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastFlorence2Model, "device", torch.device("cuda"))
    GRAPHS[change][0](f.model)
    assert lines(f)["CUDA graphs"] == GRAPHS[change][1]
    with torch.inference_mode():
        assert (graphs.why_not_recorded(f.model) is None) == (change in ("nothing", "block"))


def test_convolutions_on_a_cuda_device(f: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastFlorence2Model, "device", torch.device("cuda"))
    assert lines(f)["convolutions"] == "10 in float32 without TF32"
    conv: Any = f.model.vision_tower.convs[0].conv
    assert type(conv) is convolutions.Conv2d
    conv.padding_mode = "circular"
    assert lines(f)["convolutions"] == f"9 in float32 without TF32; plain: its padding is circular, {conv.padding}"


def test_installed_again(f: Florence2) -> None:
    before: dict[str, str] = lines(f)
    assert lines(Florence2(install(uninstall(f.model)), f.processor)) == before


def test_nothing_is_changed_by_asking(f: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, Tensor] = {name: tensor.clone() for name, tensor in f.model.state_dict().items()}
    explain_path(f)
    assert all(torch.equal(tensor, state[name]) for name, tensor in f.model.state_dict().items())
    assert torch.is_grad_enabled() and f.model not in packed._kept
