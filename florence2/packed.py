"""The decoder's step on a CPU, with its weights packed: the same mathematics as `Decoder.step`, three times as fast.

A step multiplies a row per beam with every weight of the decoder, so its time is that of reading them: 356 MB for
base in float32. MKL reads them at a fraction of the memory's bandwidth when there are two to a dozen rows; oneDNN,
with weights in its own blocked order, reads them at most of it. The packed copy is made at the first generation and
kept as long as the model lives and its weights stay as they are, which every generation makes sure of.
"""

import threading
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.attention import attend
from florence2.bart import DecoderCache, DecoderLayer
from florence2.model import Florence2Model, decodes_as_built

_ROWS = 8  # the number of rows that oneDNN arranges the weights for; others are almost as fast


class PackedLinear:
    """A linear map with its weight in oneDNN's order, optionally followed by the exact GELU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self.bias, self.after = bias, "gelu" if gelu else "none"

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, out)"""
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


class PackedDecoder:
    """`step` of a model as it was when this was made."""

    def __init__(self, model: Florence2Model):
        decoder = model.language_model.decoder
        self.embedding = model.language_model.shared.weight
        self.head = PackedLinear(model.output_weight, model.final_logits_bias[0])
        self.embed, self.positions = decoder.embed, decoder.embed_positions
        self.layers = [_PackedLayer(layer) for layer in decoder.layers if isinstance(layer, DecoderLayer)]

    def step(self, ids: Tensor, cache: DecoderCache) -> Tensor:
        """The newest id of every beam (B·K,) -> logits (B·K, V) of the next, as `Florence2Model.step`."""
        positions = cache.embed_position(self.positions)
        x = self.embed(F.embedding(ids, self.embedding)[:, None], positions)[:, 0]  # (B·K, D)
        cache.advance()
        K = cache.beams
        for i, layer in enumerate(self.layers):
            after_own, after_memory, after_mlp = layer.norms
            query, key, value = (
                layer.qkv(x).view(-1, K, 3, layer.heads, x.shape[1] // layer.heads).permute(2, 0, 3, 1, 4)
            )
            mixed = attend(query, *cache.extend(i, key, value))  # (B, heads, K, d)
            x = after_own(layer.own_out(_join_heads(mixed)).add_(x))
            query = layer.query(x).view(-1, K, layer.heads, x.shape[1] // layer.heads).transpose(1, 2)
            mixed = attend(query, *cache.memory[i], cache.memory_mask)
            x = after_memory(layer.memory_out(_join_heads(mixed)).add_(x))
            x = after_mlp(layer.fc2(layer.fc1(x)).add_(x))
        return self.head(x)


def _join_heads(mixed: Tensor) -> Tensor:
    """(B, heads, K, d) -> (B·K, D)"""
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)


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
    return torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in needed)
