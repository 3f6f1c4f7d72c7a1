"""The decoder's step on a CPU, with its weights packed: the same mathematics as `Decoder.step`, three times as fast.

A step multiplies a row per beam with every weight of the decoder, so its time is that of reading them: 356 MB for
base in float32. MKL reads them at a fraction of the memory's bandwidth when there are two to a dozen rows; oneDNN,
with weights in its own blocked order, reads them at most of it. The packed copy is made at the first generation and
kept as long as the model lives and its weights stay as they are, which every generation makes sure of.
"""

import threading
import weakref
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.model.attention import attend
from florence2.model.bart import DecoderCache, DecoderLayer
from florence2.model.florence2 import Florence2Model, decodes_as_built
from florence2.model.trace import Trace, record, scope

_ROWS = 8  # the number of rows that oneDNN arranges the weights for; others are almost as fast


class PackedLinear:
    """A linear map with its weight in oneDNN's order, optionally followed by the exact GELU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self.bias, self.after = bias, "gelu" if gelu else "none"

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.after, [], "none")
        return out


class _PackedLayer:
    def __init__(self, layer: DecoderLayer):
        own, memory = layer.self_attn, layer.encoder_attn
        parts = (own.q_proj, own.k_proj, own.v_proj)
        self.heads = own.heads
        self.qkv = PackedLinear(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
        self.own_out = PackedLinear(own.out_proj.weight, own.out_proj.bias)
        self.query = PackedLinear(memory.q_proj.weight, memory.q_proj.bias)
        self.memory_out = PackedLinear(memory.out_proj.weight, memory.out_proj.bias)
        self.fc1 = PackedLinear(layer.fc1.weight, layer.fc1.bias, gelu=True)
        self.fc2 = PackedLinear(layer.fc2.weight, layer.fc2.bias)
        self.norms = (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm)

    def __call__(self, x: Tensor, number: int, cache: DecoderCache, trace: Trace | None) -> Tensor:
        """The newest position of every beam (B·K, 1, D) -> the same, by the names of `DecoderLayer`."""
        after_own, after_memory, after_mlp = self.norms
        added = record(trace, "self_attention", self._attend_past(x, number, cache, scope(trace, "self_attention")))
        x = record(trace, "after_self_attention", after_own(added + x))
        added = record(trace, "cross_attention", self._attend_memory(x, number, cache, scope(trace, "cross_attention")))
        x = record(trace, "after_cross_attention", after_memory(added + x))
        out: Tensor = after_mlp(record(trace, "mlp", self.fc2(record(trace, "mlp.hidden", self.fc1(x)))) + x)
        return out

    def _attend_past(self, x: Tensor, number: int, cache: DecoderCache, trace: Trace | None) -> Tensor:
        qkv = self.qkv(x).view(-1, cache.beams, 3, self.heads, x.shape[2] // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, K, d)
        query, key = record(trace, "queries", query), record(trace, "keys", key)
        seen = cache.extend(number, key, record(trace, "values", value))
        return self.own_out(_join_heads(attend(query, *seen, trace=trace)))

    def _attend_memory(self, x: Tensor, number: int, cache: DecoderCache, trace: Trace | None) -> Tensor:
        query = self.query(x).view(-1, cache.beams, self.heads, x.shape[2] // self.heads).transpose(1, 2)
        query = record(trace, "queries", query)
        return self.memory_out(_join_heads(attend(query, *cache.memory[number], cache.memory_mask, trace=trace)))


class PackedDecoder:
    """`step` of a model as it was when this was made."""

    def __init__(self, model: Florence2Model):
        decoder = model.language_model.decoder
        self.embedding = model.language_model.shared.weight
        self.head = PackedLinear(model.output_weight, model.final_logits_bias[0])
        self.embed, self.positions = decoder.embed, decoder.embed_positions
        self.layers = [_PackedLayer(layer) for layer in decoder.layers if isinstance(layer, DecoderLayer)]

    def step(self, ids: Tensor, cache: DecoderCache, trace: Trace | None = None) -> Tensor:
        """The newest id of every beam (B·K,) -> logits (B·K, V) of the next, as `Florence2Model.step`."""
        inner = scope(trace, "decoder")
        x = self.embed(F.embedding(ids, self.embedding)[:, None], cache.embed_position(self.positions), inner)
        cache.advance()
        for i, layer in enumerate(self.layers):
            x = record(inner, f"layers.{i}", layer(x, i, cache, scope(inner, f"layers.{i}")))  # (B·K, 1, D)
        return record(trace, "logits", self.head(x[:, 0]))


def _join_heads(mixed: Tensor) -> Tensor:
    """(B, heads, K, d) -> (B·K, 1, D)"""
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)[:, None]


_lock = threading.Lock()
_made: "weakref.WeakKeyDictionary[Florence2Model, tuple[list[int], PackedDecoder]]" = weakref.WeakKeyDictionary()


def packed_decoder(model: Florence2Model) -> PackedDecoder | None:
    """The packed decoder of `model`, made anew when a weight has changed; None where it cannot or need not be used."""
    with _lock:
        if (
            model.device.type != "cpu"
            or model.dtype != torch.float32
            or not _is_available()
            or not decodes_as_built(model)
        ):
            _made.pop(model, None)
            return None
        text = model.language_model
        head = [] if model.lm_head is None else [model.lm_head.weight]
        weights = [*text.decoder.parameters(), text.shared.weight, *head, model.final_logits_bias]
        state = [number for weight in weights for number in (weight.data_ptr(), _fingerprint(weight))]
        known = _made.get(model)
        if known is None or known[0] != state:
            known = _made[model] = (state, PackedDecoder(model))
        return known[1]


def _fingerprint(weight: Tensor) -> int:
    """A number that changes with the values, whoever changed them and how: `weight.data += x` leaves no other trace.

    The sum of the bits as integers, 64 at once, which is as fast as memory can be read: for base 9 ms a generation.
    """
    values = weight.detach().contiguous().view(-1)
    pairs = values.numel() % 2 == 0 and values.storage_offset() % 2 == 0
    return int(values.view(torch.int64 if pairs else torch.int32).sum())


def _is_available() -> bool:
    needed = ("_reorder_linear_weight", "_linear_pointwise")
    known = torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in needed)
    return known and _is_right(torch.get_num_threads())


@cache
def _is_right(threads: int) -> bool:  # noqa: ARG001
    """Whether a packed product is that of `F.linear`, with so many threads.

    Where OpenMP gives fewer threads than torch counts on, as under OMP_THREAD_LIMIT, oneDNN (3.12, of torch 2.13)
    leaves a part of the product undone and says nothing.
    """
    with torch.inference_mode():
        x, weight = torch.linspace(-1, 1, _ROWS * 256).view(_ROWS, 256), torch.linspace(-1, 1, 512 * 256).view(512, 256)
        return torch.allclose(PackedLinear(weight, None)(x), F.linear(x, weight), atol=1e-3)
