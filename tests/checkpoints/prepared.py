"""Changes of a model as functions that `load` takes as prepare, and the answers of changed models in a new process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import florence2
from florence2 import Florence2
from florence2.model.bart import DecoderLayer
from florence2.model.trace import NO_TRACE, Trace


class Adapter(nn.Module):
    """A bottleneck after another module."""

    def __init__(self, width: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(self.down(x).relu())
        return out


def insert_adapters(model: Any) -> None:
    """One after the MLP of each decoder layer, and one in a block of the vision tower."""
    for layer in model.language_model.decoder.layers:
        layer.adapter = Adapter(model.config.text.d_model)
        layer.fc2.register_forward_hook(lambda module, inputs, out, adapter=layer.adapter: adapter(out))
    block = model.vision_tower.blocks[1][0].spatial_block
    block.adapter = Adapter(model.config.vision.dim_embed[1])
    block.ffn.register_forward_hook(lambda module, inputs, out, adapter=block.adapter: adapter(out))


class Tower(nn.Module):
    """Strided convolutions, with buffers of each kind: float, whole numbers, and one that is not stored."""

    ramp: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 8, stride=8)
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("ramp", torch.linspace(0.0, 3.0, channels)[:, None, None], persistent=False)

    def forward(self, pixel_values: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        x: Tensor = self.norm(self.stem(pixel_values)) + self.ramp
        return x.permute(0, 2, 3, 1)  # (B, h, w, C)


def replace_tower(model: Any) -> None:
    model.vision_tower = Tower(model.config.vision.dim_embed[-1])


def prune_heads(model: Any) -> None:
    """Leave the first half of the heads in the first self-attention and the last cross-attention of the decoder."""
    layers = model.language_model.decoder.layers
    for attention in (layers[0].self_attn, layers[-1].encoder_attn):
        kept = attention.q_proj.weight.shape[0] // 2
        for name in ("q_proj", "k_proj", "v_proj"):
            part = getattr(attention, name)
            part.weight, part.bias = nn.Parameter(part.weight[:kept]), nn.Parameter(part.bias[:kept])
        attention.out_proj.weight = nn.Parameter(attention.out_proj.weight[:, :kept])
        attention.heads //= 2


def add_second_head(model: Any) -> None:
    """A head next to the output projection, which a hook adds to it."""
    model.second = nn.Linear(model.config.text.d_model, model.config.text.vocab_size)
    norm = model.language_model.decoder.layers[-1].final_layer_norm
    norm.register_forward_hook(lambda module, inputs, out, second=model.second: out + 0.1 * second(out)[..., :1])


def repeat_layer(model: Any) -> None:
    """Run the last decoder layer twice."""
    layers = model.language_model.decoder.layers
    model.language_model.decoder.layers = nn.ModuleList([*layers, layers[-1]])


class LouderLayer(DecoderLayer):
    """A decoder layer whose MLP adds twice as much."""

    def add_mlp(self, x: Tensor, trace: Trace) -> Tensor:
        out: Tensor = self.final_layer_norm(x + 2 * self.fc2(self.activation(self.fc1(x))))
        return out


def make_louder(model: Any) -> None:
    model.language_model.decoder.layers[0].__class__ = LouderLayer


PREPARE: dict[str, Callable[[Any], None]] = {
    "adapter": insert_adapters,
    "native adapter": insert_adapters,
    "tower": replace_tower,
    "native tower": replace_tower,
    "pruned heads": prune_heads,
    "second head": add_second_head,
    "repeated layer": repeat_layer,
    "subclass": make_louder,
}
"""By the name of the folder in which a test saves the changed model."""


def answer(f: Florence2) -> list[Any]:
    """Return ids and log-probabilities of one greedy answer."""
    image = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    found = f.run("<OD>", image, num_beams=1, max_new_tokens=8, no_repeat_ngram_size=0)
    return [list(found.token_ids), list(found.token_logprobs)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folders = {path.name: path for path in Path(sys.argv[1]).iterdir()}
    print(json.dumps({name: answer(florence2.load(path, prepare=PREPARE.get(name))) for name, path in folders.items()}))
