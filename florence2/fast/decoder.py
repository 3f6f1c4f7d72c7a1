"""The decoder's step on a CPU without a call for each of its modules: the numbers of `model.bart`, sooner.

A step of a small model, or of few rows, takes as long to call a dozen modules a layer as to compute what they compute.
Here the same operations are called in the same order. Together with a search that leaves its books alone where nothing
ends, a step of nano took 0.75 of its time (benchmarks/COMPARE-nano.md).
"""

import weakref
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.fast.cuda.kernels.availability import why_not_cuda
from florence2.fast.cuda.layers import FusedDecoderLayer
from florence2.fast.linear import Linear, is_replaced, product, why_plain
from florence2.fast.unchanged import Watch, find_change, remember
from florence2.model import bart
from florence2.model.bart import Attention, Decoder, DecoderLayer
from florence2.model.cache import CachedMemory, DecoderCache, OwnPast
from florence2.model.trace import NO_TRACE, Trace

_KINDS = remember(
    frozenset((nn.ModuleList, DecoderLayer, FusedDecoderLayer, Attention, Linear, nn.LayerNorm, OwnPast, CachedMemory))
)
_SOURCES = ("past", "memory", "beams_as_queries")
_PLAIN_SOURCES = [getattr(DecoderCache, name) for name in _SOURCES]
_Map = Callable[[Tensor], Tensor]


class DirectDecoder(Decoder):
    """Stands in for `Decoder`."""

    def step(self, embeddings: Tensor, cache: DecoderCache, trace: Trace = NO_TRACE) -> Tensor:
        """Decode one token of each beam, (B·K, 1, D) -> (B·K, 1, D), as its parent does where a part was changed."""
        known = None if why_not_direct(embeddings.device, embeddings.dtype) else _known_layers(self, cache, trace)
        if known is None:
            return super().step(embeddings, cache, trace)
        x = self.embed(embeddings, cache.embed_position(self.embed_positions))
        cache.advance()
        x = cache.beams_as_queries(x)  # (B, K, D)
        for i, layer in enumerate(known.layers):
            x = layer.step(x, cache, i)
        return x.reshape(embeddings.shape)


def why_not_direct(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return in words why layers on this device are called as modules; None if they are not."""
    # layers that compute by kernels of their own have to be called
    return why_plain(device, dtype) or (None if why_not_cuda(device) else "kernels compute its layers")


class _DirectAttention:
    """The parts of an `Attention`."""

    def __init__(self, attention: Attention):
        self.attention = attention
        self.query, self.key, self.value, self.out = (
            _map(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        )

    def split(self, x: Tensor) -> Tensor:
        """(B, K, heads·d) -> (B, heads, K, d)"""
        return x.view(*x.shape[:2], self.attention.heads, -1).transpose(1, 2)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attend from `x` (B, K, D) to keys and values -> (B, K, D)."""
        # by its name in its module, where somebody may have replaced it
        mixed = bart.attend(self.split(self.query(x)), keys, values, mask, causal=causal)  # type: ignore[attr-defined]
        return self.out(mixed.transpose(1, 2).flatten(2))


class _DirectLayer:
    """The parts of a `DecoderLayer`; one whose parts are not known raises KeyError."""

    def __init__(self, layer: DecoderLayer):
        self.layer = layer
        self.past, self.memory = _DirectAttention(layer.self_attn), _DirectAttention(layer.encoder_attn)
        self.after_past, self.after_memory = _norm(layer.self_attn_layer_norm), _norm(layer.encoder_attn_layer_norm)
        self.fc1, self.fc2, self.after_mlp = _map(layer.fc1), _map(layer.fc2), _norm(layer.final_layer_norm)

    def step(self, x: Tensor, cache: DecoderCache, index: int) -> Tensor:
        """(B, K, D) -> (B, K, D)"""
        past, memory = self.past, self.memory
        x = self.after_past(
            x + past.attend(x, *cache.extend(index, past.split(past.key(x)), past.split(past.value(x))))
        )
        x = self.after_memory(x + memory.attend(x, *cache.projected[index]))
        return self.after_mlp(x + self.fc2(self.layer.activation(self.fc1(x))))

    @property
    def is_eager(self) -> bool:
        """Whether an attention is to be written out."""
        return not self.past.attention.attention == self.memory.attention.attention == "sdpa"


class _KnownLayers:
    """The layers of one decoder, in which nothing was changed when this was made."""

    def __init__(self, layers: nn.Module):
        self.list, self.watch = layers, Watch(layers, _KINDS)
        self.layers = [_DirectLayer(cast(DecoderLayer, layer)) for layer in cast(nn.ModuleList, layers)]


_known: "weakref.WeakKeyDictionary[nn.Module, _KnownLayers]" = weakref.WeakKeyDictionary()


def _known_layers(decoder: Decoder, cache: DecoderCache, trace: Trace) -> _KnownLayers | None:
    """Return the parts of the decoder's layers; None where they may only be called."""
    if trace is not NO_TRACE or is_replaced():
        return None
    if [getattr(type(cache), name) for name in _SOURCES] != _PLAIN_SOURCES or not vars(cache).keys().isdisjoint(
        _SOURCES
    ):
        return None
    found = _known.get(decoder)
    if found is None or found.list is not decoder.layers or found.watch.has_changed():
        found = _find_layers(decoder.layers)
        if found is None:
            _known.pop(decoder, None)
            return None
        _known[decoder] = found
    return None if any(layer.is_eager for layer in found.layers) else found


def why_called(layers: nn.Module, path: str = "") -> str | None:
    """Return in words why a decoder's layers, at `path` in the model, are called as modules; None if they are not."""
    if is_replaced():
        return "nn.Linear.forward was replaced"
    if any(part.attention != "sdpa" for part in layers.modules() if isinstance(part, Attention)):
        return "eager attention was asked for"
    return find_change(layers, _KINDS, path)


def _find_layers(layers: nn.Module) -> _KnownLayers | None:
    if why_called(layers) is not None:
        return None
    try:
        return _KnownLayers(layers)
    except (AttributeError, KeyError):  # a part is missing, or a weight is not a parameter
        return None


def _map(part: nn.Module) -> _Map:
    parameters = _parameters_of(part)
    return lambda x: product(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]


def _norm(part: nn.LayerNorm) -> _Map:
    parameters = _parameters_of(part)
    return lambda x: F.layer_norm(x, part.normalized_shape, parameters["weight"], parameters["bias"], part.eps)


def _parameters_of(part: nn.Module) -> Mapping[str, Tensor | None]:
    """Return the dictionary of a part's parameters, whose values may be exchanged. Raises KeyError without either."""
    missing = {"weight", "bias"} - part._parameters.keys()
    if missing:
        raise KeyError(min(missing))
    return part._parameters
