"""An experiment never gets the old model's answer: after each change every path gives the new one, and the same.

Four ways to one answer: the default path (after an answer of the unchanged model, so that whatever it keeps is stale),
the model without its faster ways, a loop over the uncached `decode`, and a traced run.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import florence2
from florence2 import Florence2
from florence2.fast import packed
from florence2.fast.install import uninstall
from florence2.model.bart import Attention, DecoderLayer
from florence2.model.davit import ChannelAttention, Mlp
from florence2.model.florence2 import Florence2Model
from tests.release import keep

PROMPT, TOKENS = "<OD>", 3


@dataclass
class Parts:
    """The parts of a model by short names."""

    model: Any
    text: Any
    decoder: Any
    first: Any  # layer of the decoder
    own: Any  # its self-attention
    cross: Any
    encoder: Any  # first layer of the encoder
    window: Any  # block of the vision tower
    channel: Any

    @classmethod
    def of(cls, model: Any) -> "Parts":
        text, pair = model.language_model, model.vision_tower.blocks[1][0]
        first = text.decoder.layers[0]
        return cls(
            model,
            text,
            text.decoder,
            first,
            first.self_attn,
            first.encoder_attn,
            text.encoder.layers[0],
            pair.spatial_block,
            pair.channel_block,
        )


def flip(weight: Tensor, *dims: int) -> None:
    with torch.no_grad():
        weight.copy_(weight.flip(*dims))


def roll_heads(attention: Any) -> None:
    """Head k takes the place of head k + 1 in queries, keys and values, but not in the output."""
    width = attention.q_proj.weight.shape[0] // attention.heads
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            for tensor in (getattr(attention, name).weight, getattr(attention, name).bias):
                tensor.copy_(tensor.roll(width, 0))


def load_permuted(p: Parts) -> None:
    state = {name: tensor.clone() for name, tensor in p.model.state_dict().items()}
    for name in state:
        if ".fc1." in name:
            state[name] = state[name].flip(0)
    p.model.load_state_dict(state)


def set_layers(p: Parts, *indices: int) -> None:
    p.decoder.layers = nn.ModuleList([p.decoder.layers[i] for i in indices])


def prune(attention: Any) -> None:
    """Leave only the first half of the heads."""
    kept = attention.q_proj.weight.shape[0] // 2
    for name in ("q_proj", "k_proj", "v_proj"):
        part = getattr(attention, name)
        smaller = nn.Linear(part.in_features, kept)
        smaller.weight.data, smaller.bias.data = part.weight.data[:kept].clone(), part.bias.data[:kept].clone()
        setattr(attention, name, smaller)
    attention.out_proj.weight = nn.Parameter(attention.out_proj.weight.data[:, :kept].clone())
    attention.heads //= 2


def grow_adapter(layer: Any) -> None:
    torch.manual_seed(5)
    layer.adapter = nn.Linear(layer.fc2.out_features, layer.fc2.out_features)
    layer.fc2.register_forward_hook(lambda module, inputs, output: output + layer.adapter(output))


class SiluLayer(DecoderLayer):
    """A decoder layer with another activation."""

    def add_mlp(self, x: Tensor, trace: Any) -> Tensor:
        out: Tensor = self.final_layer_norm(x + self.fc2(F.silu(self.fc1(x))))
        return out


def be(part: Any, kind: type) -> None:
    part.__class__ = kind


def hook(part: nn.Module) -> None:
    part.register_forward_hook(lambda module, inputs, output: output * 1.5)


def pre_hook(part: nn.Module) -> None:
    part.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5, *inputs[1:]))


def shadow(part: Any, name: str, factor: float = 1.5) -> None:
    """Put a method of one's own in the place of an instance's."""
    original = getattr(part, name)

    def mine(*arguments: Any, **keywords: Any) -> Any:
        out = original(*arguments, **keywords)
        return tuple(value * factor for value in out) if isinstance(out, tuple) else out * factor

    setattr(part, name, mine)


def drop_everything(p: Parts) -> None:
    """Dropout at a rate that leaves nothing, in one layer alone: random, and yet the same in every path."""
    p.first.dropout = 1.0
    p.first.train()


CHANGES: dict[str, Callable[[Parts], object]] = {
    "fc1 rows reversed": lambda p: flip(p.first.fc1.weight, 0),
    "fc1 columns reversed": lambda p: flip(p.first.fc1.weight, 1),
    "fc2 both reversed": lambda p: flip(p.first.fc2.weight, 0, 1),
    "fc2 reversed by .data": lambda p: flip(p.first.fc2.weight.data, 0),
    "fc1 bias reversed": lambda p: flip(p.first.fc1.bias, 0),
    "fc1 scaled": lambda p: p.first.fc1.weight.data.mul_(2),
    "fc1 one value": lambda p: p.first.fc1.weight.data[0, 0].add_(5.0),
    "fc1 replaced .data": lambda p: setattr(p.first.fc1.weight, "data", p.first.fc1.weight.data.flip(0)),
    "fc1 new parameter": lambda p: setattr(p.first.fc1, "weight", nn.Parameter(p.first.fc1.weight.data.flip(0))),
    "self-attention heads rolled": lambda p: roll_heads(p.own),
    "cross-attention heads rolled": lambda p: roll_heads(p.cross),
    "encoder heads rolled": lambda p: roll_heads(p.encoder.self_attn),
    "embedding rows exchanged": lambda p: flip(p.text.shared.weight, 0),
    "embedding rows exchanged by .data": lambda p: flip(p.text.shared.weight.data, 0),
    "positions reversed": lambda p: flip(p.decoder.embed_positions.weight, 0),
    "output bias reversed": lambda p: flip(p.model.final_logits_bias, 1),
    "output bias replaced": lambda p: setattr(p.model, "final_logits_bias", p.model.final_logits_bias.flip(1)),
    "state loaded": load_permuted,
    "layers reordered": lambda p: set_layers(p, 1, 0),
    "a layer twice": lambda p: set_layers(p, 0, 1, 1),
    "a layer left out": lambda p: set_layers(p, 1),
    "self-attention heads pruned": lambda p: prune(p.own),
    "cross-attention heads pruned": lambda p: prune(p.cross),
    "heads of another number": lambda p: setattr(p.own, "heads", 2),
    "heads of another number in the memory": lambda p: setattr(p.cross, "heads", 2),
    "eps of a norm": lambda p: setattr(p.first.final_layer_norm, "eps", 10.0),
    "eps of the embedding's norm": lambda p: setattr(p.decoder.layernorm_embedding, "eps", 10.0),
    "scale of embeddings": lambda p: setattr(p.decoder, "scale", 3.0),
    "a layer in training": drop_everything,
    "an adapter": lambda p: grow_adapter(p.first),
    "another activation by class": lambda p: be(p.first, SiluLayer),
    "another activation": lambda p: setattr(p.first, "activation", torch.tanh),
    "another activation as a module": lambda p: setattr(p.first, "activation", nn.Tanh()),
    "another activation in the encoder": lambda p: setattr(p.encoder, "activation", torch.tanh),
    "another activation in the tower": lambda p: setattr(p.channel.ffn, "activation", torch.tanh),
    "a linear map replaced": lambda p: setattr(p.first, "fc1", nn.Sequential(p.first.fc1, nn.Tanh())),
    "a norm replaced": lambda p: setattr(p.first, "final_layer_norm", nn.Identity()),
    "hook on a decoder layer": lambda p: hook(p.first),
    "hook on self-attention": lambda p: hook(p.own),
    "hook on cross-attention": lambda p: hook(p.cross),
    "hook on a linear map": lambda p: hook(p.first.fc1),
    "hook on the key projection": lambda p: hook(p.own.k_proj),
    "hook on a norm": lambda p: hook(p.first.self_attn_layer_norm),
    "hook on the embedding": lambda p: hook(p.text.shared),
    "pre-hook on self-attention": lambda p: pre_hook(p.own),
    "pre-hook on fc2": lambda p: pre_hook(p.first.fc2),
    "hook on an encoder layer": lambda p: hook(p.encoder),
    "forward of a layer": lambda p: shadow(p.first, "forward"),
    "forward of attention": lambda p: shadow(p.own, "forward"),
    "keys_values of attention": lambda p: shadow(p.cross, "keys_values"),
    "drop of a layer": lambda p: shadow(p.first, "drop"),
    "add_mlp of a layer": lambda p: shadow(p.first, "add_mlp"),
    "embed of the decoder": lambda p: shadow(p.decoder, "embed"),
    "logits of the model": lambda p: shadow(p.model, "logits", -1.0),
    "window of the tower": lambda p: setattr(p.window.window_attn, "window", 3),
    "groups of the tower": lambda p: setattr(p.channel.channel_attn, "groups", 1),
    "tower weight rows reversed": lambda p: flip(p.channel.channel_attn.qkv.weight, 0),
    "hook in the tower": lambda p: hook(p.channel.channel_attn),
    "method of a block": lambda p: shadow(p.channel, "_drop_path"),
    "forward in the tower": lambda p: shadow(p.window.window_attn, "forward"),
    "projection reversed": lambda p: flip(p.model.multi_modal_projector.image_projection.weight, 0),
    "lm_head of its own": lambda p: setattr(p.model, "lm_head", florence2_head(p.text.shared.weight.flip(0))),
    "untied head": lambda p: p.model.untie_head(p.text.shared.weight.detach().flip(0)),
    "untied answers": lambda p: p.model.untie_answers(p.text.shared.weight.detach().flip(0)),
    "embed_answer of the language model": lambda p: shadow(p.text, "embed_answer"),
}


def florence2_head(weight: Tensor) -> nn.Module:
    from florence2.model.florence2 import Head

    return Head(weight.detach().clone())


@pytest.fixture(autouse=True)
def _everything_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_measure_gain", lambda weights, rows: 2.0)
    monkeypatch.setattr(packed, "_gains", {})


@pytest.fixture
def f(mini: Florence2) -> Florence2:
    return Florence2(copy.deepcopy(mini.model), mini.processor)


@pytest.fixture
def image() -> Image.Image:
    return Image.linear_gradient("L").resize((90, 60)).convert("RGB")


def scores(f: Florence2, image: Image.Image) -> tuple[tuple[int, ...], Tensor]:
    options = f.options(num_beams=1, max_new_tokens=TOKENS, no_repeat_ngram_size=0, forced_eos_token_id=None)
    answer = f.run(PROMPT, image, options=options)
    return answer.token_ids, torch.tensor(answer.token_logprobs)


def scores_uncached(f: Florence2, image: Image.Image) -> tuple[tuple[int, ...], Tensor]:
    """The same by the specification, one whole sequence after another."""
    model: Florence2Model = f.model
    ids, logprobs = [model.config.text.decoder_start_token_id], []
    with torch.no_grad():
        memory = model.encode(model.encode_image(f.processor.image(image)), torch.tensor([f.processor.prompt(PROMPT)]))
        for n in range(TOKENS):
            row = model.decode(torch.tensor([ids]), memory)[0, -1].log_softmax(-1)
            forced = model.config.generation.get("forced_bos_token_id")
            ids.append(forced if n == 0 and forced is not None else int(row.argmax()))
            logprobs.append(0.0 if n == 0 and forced is not None else float(row.max()))
            if ids[-1] == model.config.text.eos_token_id:
                break
    return tuple(ids), torch.tensor(logprobs)


def agree(one: tuple[tuple[int, ...], Tensor], other: tuple[tuple[int, ...], Tensor]) -> bool:
    same_length = one[1].shape == other[1].shape
    return one[0] == other[0] and same_length and torch.allclose(one[1], other[1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("change", keep(range(0, len(CHANGES), 3), CHANGES))
def test_every_path_gives_the_changed_models_answer(f: Florence2, image: Image.Image, change: str) -> None:
    original = scores(f, image)
    CHANGES[change](Parts.of(f.model))
    default = scores(f, image)
    with f.trace("decoder.*", "encoder.*", "vision_tower.*"):
        traced = scores(f, image)
    uncached = scores_uncached(f, image)
    plain = scores(Florence2(uninstall(f.model), f.processor), image)
    assert agree(default, uncached) and agree(plain, uncached) and agree(traced, uncached)
    assert not agree(uncached, original), "the change changes nothing, so this test shows nothing"


CLASSES: dict[str, tuple[type, str]] = {
    "logits of the model": (Florence2Model, "logits"),
    "forward of decoder layers": (DecoderLayer, "forward"),
    "forward of attention": (Attention, "forward"),
    "keys_values of attention": (Attention, "keys_values"),
    "forward of torch's linear maps": (nn.Linear, "forward"),
    "forward of torch's norms": (nn.LayerNorm, "forward"),
    "forward of channel attention": (ChannelAttention, "forward"),
    "forward of the tower's MLPs": (Mlp, "forward"),
}


@pytest.mark.parametrize("change", CLASSES)
def test_a_method_replaced_on_a_class(
    f: Florence2, image: Image.Image, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = scores(f, image)
    kind, name = CLASSES[change]
    method = getattr(kind, name)

    def mine(*arguments: Any, **keywords: Any) -> Any:
        out = method(*arguments, **keywords)
        return tuple(value * 1.3 for value in out) if isinstance(out, tuple) else out * 1.3

    monkeypatch.setattr(kind, name, mine)
    default, uncached = scores(f, image), scores_uncached(f, image)
    assert agree(default, uncached) and not agree(uncached, original)


def test_hooks_on_all_modules(f: Florence2, image: Image.Image) -> None:
    original = scores(f, image)

    def louder(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output * 1.3 if isinstance(module, nn.LayerNorm) else None

    handle = nn.modules.module.register_module_forward_hook(louder)
    try:
        default, uncached = scores(f, image), scores_uncached(f, image)
    finally:
        handle.remove()
    assert agree(default, uncached) and not agree(uncached, original)
    assert agree(scores(f, image), original)


def test_beams_agree_too(f: Florence2, image: Image.Image) -> None:
    """Rows of a weight exchanged, with the search that is the default."""
    before = f.run(PROMPT, image, options=f.options(max_new_tokens=TOKENS))
    flip(Parts.of(f.model).first.fc1.weight, 0)
    fast = f.run(PROMPT, image, options=f.options(max_new_tokens=TOKENS))
    plain = Florence2(uninstall(f.model), f.processor).run(PROMPT, image, options=f.options(max_new_tokens=TOKENS))
    assert fast.token_ids == plain.token_ids and fast.token_logprobs == pytest.approx(plain.token_logprobs, abs=1e-3)
    assert before.token_logprobs != pytest.approx(plain.token_logprobs, abs=1e-3)


def test_nothing_changed_changes_nothing(mini_folder: Path, image: Image.Image) -> None:
    fast, plain = florence2.load(mini_folder), florence2.load(mini_folder, attention="eager")
    assert agree(scores(fast, image), scores(plain, image)) and agree(scores(fast, image), scores_uncached(fast, image))
