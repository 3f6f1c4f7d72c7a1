"""The parts of a model as ONNX graphs: each is a module that calls the model's own, and the names of its ends.

Dimensions: B batch, H W pixels, N image tokens, S source and T target positions, P positions of the past, D model.
Every length is dynamic. The graphs check no limits: a grid larger than the position table, or more positions than the
model has, is for the caller to refuse.
"""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.export.graphs.folded import fold_channel_attention
from florence2.lite import layout
from florence2.lite.layout import BATCH, PAST, SOURCE, TARGET, TOTAL, cache_names
from florence2.model.bart import POSITION_OFFSET, Attention, DecoderLayer
from florence2.model.cache import KeysValues
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import Trace

OPSET = 17  # of the graphs of the model: the oldest with LayerNormalization, and read by every present runtime

Dims = Mapping[int, str]


@dataclass(frozen=True)
class TracedPart:
    """A module of the model to trace: example inputs by name, and the dynamic dimensions."""

    module: nn.Module
    inputs: Mapping[str, Tensor]
    dims: Mapping[str, Dims]
    """Of every input and output, in their order."""

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs."""
        return [name for name in self.dims if name not in self.inputs]


def trace_part(part: TracedPart) -> onnx.ModelProto:
    """Return a part as a graph, with the weights in it as float32."""
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # the shapes that become constants are those of weights; the proof runs every graph at other sizes
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # torch's newer exporter takes ten times as long, and needs onnxscript
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(
            part.module.eval(),
            tuple(part.inputs.values()),
            cast(Any, buffer),
            input_names=list(part.inputs),
            output_names=part.outputs,
            dynamic_axes={name: dict(dims) for name, dims in part.dims.items()},
            opset_version=OPSET,
            dynamo=False,
        )
    graph = onnx.load_from_string(buffer.getvalue())
    _name_outputs(graph, part)
    return graph


def _name_outputs(graph: onnx.ModelProto, part: TracedPart) -> None:
    """Write the names of dynamic dimensions of outputs, where the exporter has found names of its own."""
    for value in graph.graph.output:
        for axis, name in part.dims[value.name].items():
            value.type.tensor_type.shape.dim[axis].dim_param = name


# ---- the parts ------------------------------------------------------------------------------------------------------


class VisionPart(nn.Module):
    """Pixel values (B, 3, H, W) -> image tokens (B, N, D), with channel attention folded where that is faster."""

    def __init__(self, model: Florence2Model, height: int, width: int):
        super().__init__()
        self.tower = fold_channel_attention(model.vision_tower, height, width)
        self.projector = model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.projector(self.tower(pixel_values))
        return out


class EncoderPart(nn.Module):
    """Mask (B, S) and embeddings (B, S, D) of image and prompt -> memory (B, S, D)."""

    def __init__(self, model: Florence2Model):
        super().__init__()
        self.encoder = model.language_model.encoder

    def forward(self, attention_mask: Tensor, inputs_embeds: Tensor) -> Tensor:
        memory: Tensor = self.encoder(inputs_embeds, attention_mask.bool())
        return memory


class MemoryPart(nn.Module):
    """Memory (B, S, D) -> its keys and values (B, heads, S, d) for every layer of the decoder."""

    def __init__(self, model: Florence2Model):
        super().__init__()
        self.layers = model.language_model.decoder.layers

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        pairs = [cast(DecoderLayer, layer).encoder_attn.keys_values(encoder_hidden_states) for layer in self.layers]
        return tuple(tensor for pair in pairs for tensor in pair)


class StepPart(nn.Module):
    """Embeddings of T ids after P cached ones -> logits (B, T, V) and the grown cache.

    The cache is given as keys and values (B, heads, P, d) of the answer so far, layer by layer, then those of the
    memory. Only the former are returned.
    """

    def __init__(self, model: Florence2Model):
        super().__init__()
        self.model = model  # for its output projection, which may be the token embedding
        self.decoder = model.language_model.decoder

    def forward(self, encoder_attention_mask: Tensor, inputs_embeds: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        layers, past = len(self.decoder.layers), cache[0].shape[2]
        own = [Grown(*pair) for pair in _pairs(cache[: 2 * layers])]
        mask = encoder_attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
        memory = [self.given(KeysValues(*pair, mask)) for pair in _pairs(cache[2 * layers :])]
        return self.decode(inputs_embeds, past, own, memory)

    def given(self, known: KeysValues) -> "Given":
        """Return what the layers attend to for the keys and values of a memory."""
        return Given(known)

    def decode(
        self, inputs_embeds: Tensor, past: int, own: Sequence["Grown"], memory: Sequence["Given"]
    ) -> tuple[Tensor, ...]:
        """Run the layers over what each of them attends to; return the logits and the grown cache."""
        places = torch.arange(inputs_embeds.shape[1]) + past  # (T,)
        table = self.decoder.embed_positions.weight
        x = self.decoder.embed(inputs_embeds, F.embedding(places + POSITION_OFFSET, table))
        causal = torch.arange(inputs_embeds.shape[1] + past) <= places[:, None]  # (T, P + T)
        for layer, answer, source in zip(self.decoder.layers, own, memory, strict=True):
            answer.mask = causal
            x = layer(x, answer, source)
        return self.model.logits(x), *(tensor for answer in own for tensor in answer.pair)


class SharedStepPart(StepPart):
    """A step whose memories may be fewer than its sequences: keys, values and mask may have a batch G that divides B.

    The sequences that share a memory follow each other.
    """

    def given(self, known: KeysValues) -> "Given":
        """Return what lets all sequences of a memory attend to it together."""
        return Shared(known)


class FirstPart(StepPart):
    """Mask, memory and embeddings of the first T ids -> logits, their cache, and that of the memory."""

    def forward(  # type: ignore[override]
        self, encoder_attention_mask: Tensor, encoder_hidden_states: Tensor, inputs_embeds: Tensor
    ) -> tuple[Tensor, ...]:
        mask = encoder_attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
        own = [Grown() for _ in self.decoder.layers]
        projected = MemoryPart(self.model)(encoder_hidden_states)
        memory = [Given(KeysValues(*pair, mask)) for pair in _pairs(projected)]
        return *self.decode(inputs_embeds, 0, own, memory), *projected


class Grown:
    """The source of a self-attention: cached keys and values, then those of the newest ids."""

    def __init__(self, *past: Tensor):
        self.pair: tuple[Tensor, ...] = past
        self.mask: Tensor | None = None

    def as_queries(self, x: Tensor) -> Tensor:
        """Return `x` (B, T, D) unchanged."""
        return x

    def keys_values(self, attention: Attention, x: Tensor, trace: Trace) -> KeysValues:
        """Append the keys and values of `x` to the cached ones."""
        keys, values = attention.keys_values(x, trace)
        if self.pair:
            keys, values = torch.cat([self.pair[0], keys], dim=2), torch.cat([self.pair[1], values], dim=2)
        self.pair = keys, values  # (B, heads, P + T, d) each
        return KeysValues(keys, values, self.mask)


class Given:
    """The source of a cross-attention whose keys and values are known."""

    def __init__(self, known: KeysValues):
        self.known = known

    def as_queries(self, x: Tensor) -> Tensor:
        """Return `x` (B, T, D) unchanged."""
        return x

    def keys_values(self, attention: Attention, x: Tensor, trace: Trace) -> KeysValues:  # noqa: ARG002
        """Return the known ones."""
        return self.known


class Shared(Given):
    """The same, for B sequences that share G memories: those of one memory stand for its T positions."""

    def as_queries(self, x: Tensor) -> Tensor:
        """Return `x` (B, T, D) as (G, B / G · T, D)."""
        return x.reshape(self.known.keys.shape[0], -1, x.shape[-1])


def _pairs(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tensors[::2], tensors[1::2], strict=True)


# ---- their inputs, outputs and dimensions ---------------------------------------------------------------------------


def model_parts(model: Florence2Model, height: int, width: int) -> dict[str, TracedPart]:
    """Return the parts to trace, by the names of their graphs; `height` and `width` are of the example image."""
    D, V = model.config.text.d_model, model.config.text.vocab_size
    ids, embeddings = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, D)
    mask, newest = torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 2, D)
    text, target = {0: BATCH, 1: "sequence_length"}, {0: BATCH, 1: TARGET}
    source = {"encoder_attention_mask": {0: BATCH, 1: SOURCE}, "encoder_hidden_states": {0: BATCH, 1: SOURCE}}
    own = cache_dims("past_key_values", "decoder", model), cache_dims("present", "decoder", model)
    memory = cache_dims("past_key_values", "encoder", model), cache_dims("present", "encoder", model)
    cache = {name: torch.zeros(2, *_head_shape(model, 3)) for name in own[0]}
    cache |= {name: torch.zeros(2, *_head_shape(model, 5)) for name in memory[0]}
    step = {"encoder_attention_mask": mask, "inputs_embeds": newest, **cache}
    step_dims = {
        "encoder_attention_mask": source["encoder_attention_mask"],
        "inputs_embeds": target,
        **own[0],
        **memory[0],
        "logits": target,
        **own[1],
    }
    pixels = {"pixel_values": torch.zeros(2, 3, height, width)}
    return {
        layout.VISION: TracedPart(
            VisionPart(model, height, width),
            pixels,
            {"pixel_values": {0: BATCH, 2: "height", 3: "width"}, "image_features": {0: BATCH, 1: "image_tokens"}},
        ),
        layout.EMBED: TracedPart(
            model.language_model.shared, {"input_ids": ids % V}, {"input_ids": text, "inputs_embeds": text}
        ),
        layout.ENCODER: TracedPart(
            EncoderPart(model),
            {"attention_mask": mask, "inputs_embeds": embeddings},
            {name: {0: BATCH, 1: SOURCE} for name in ("attention_mask", "inputs_embeds", "last_hidden_state")},
        ),
        layout.FIRST: TracedPart(
            FirstPart(model),
            {"encoder_attention_mask": mask, "encoder_hidden_states": embeddings, "inputs_embeds": newest},
            {**source, "inputs_embeds": target, "logits": target, **own[1], **memory[1]},
        ),
        # what is merged with CROSS: other clients give it a memory for each sequence
        layout.MERGED: TracedPart(StepPart(model), step, step_dims),
        layout.STEP: TracedPart(SharedStepPart(model), step, step_dims),
        layout.CROSS: TracedPart(
            MemoryPart(model),
            {"encoder_hidden_states": embeddings},
            {"encoder_hidden_states": source["encoder_hidden_states"], **memory[1]},
        ),
    }


def cache_dims(prefix: str, source: str, model: Florence2Model) -> dict[str, Dims]:
    """Return the dynamic dimensions of a cache's keys and values, by name."""
    own = PAST if prefix == "past_key_values" else TOTAL
    length = {2: own if source == "decoder" else SOURCE}
    return {
        name: {0: BATCH, **length} for name in cache_names(prefix, source, len(model.language_model.decoder.layers))
    }


def _head_shape(model: Florence2Model, length: int) -> tuple[int, int, int]:
    """Return (heads, length, d) of the decoder's keys and values."""
    text = model.config.text
    return text.decoder_attention_heads, length, text.d_model // text.decoder_attention_heads
