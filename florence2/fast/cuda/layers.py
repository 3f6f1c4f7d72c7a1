"""The text layers with fused kernels: the numbers of `model.bart` with fewer and better filled kernels.

A residual and its LayerNorm are one kernel, GELU works in place, q, k and v of a self-attention are one product where
`fast.cuda.weights` laid them together, and the K beams of an image attend by a kernel made for few queries.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from florence2.fast.cuda.kernels.availability import are_plain, why_no_kernel, why_no_norm, why_not_cuda
from florence2.fast.cuda.weights import joint_map
from florence2.fast.linear import Linear
from florence2.fast.packed import is_plain
from florence2.fast.unchanged import find_change, remember
from florence2.model.attention import attend, gelu
from florence2.model.bart import Attention, DecoderLayer, EncoderLayer
from florence2.model.cache import Itself, KeySource, OwnPast
from florence2.model.trace import NO_TRACE, Trace


class FusedEncoderLayer(EncoderLayer):
    """Stands in for `EncoderLayer`."""

    def forward(self, x: Tensor, source: KeySource, trace: Trace = NO_TRACE) -> Tensor:
        """Compute the layer by kernels, or as its parent does where that is not possible."""
        if not is_plain(x) or why_plain(self, x.device, trace) is not None:
            return EncoderLayer.forward(
                self, x, source, trace
            )  # by name: somebody may have kept this method, and undone `install`
        x = _add_norm(x, _attend(self.self_attn, x, source), self.self_attn_layer_norm)
        return _add_norm(x, _mlp(self, x), self.final_layer_norm)


class FusedDecoderLayer(DecoderLayer):
    """Stands in for `DecoderLayer`."""

    def forward(self, x: Tensor, past: KeySource, memory: KeySource, trace: Trace = NO_TRACE) -> Tensor:
        """Compute the layer by kernels, or as its parent does where that is not possible."""
        if not is_plain(x) or why_plain(self, x.device, trace) is not None:
            return DecoderLayer.forward(self, x, past, memory, trace)
        x = _add_norm(x, _attend(self.self_attn, x, past), self.self_attn_layer_norm)
        x = _add_norm(x, _attend(self.encoder_attn, x, memory), self.encoder_attn_layer_norm)
        return _add_norm(x, _mlp(self, x), self.final_layer_norm)


_KINDS = remember(frozenset((FusedEncoderLayer, FusedDecoderLayer, Attention, Linear, nn.LayerNorm)))


def why_plain(
    layer: FusedEncoderLayer | FusedDecoderLayer, device: torch.device, trace: Trace, path: str = ""
) -> str | None:
    """Return in words why a layer, at `path` in the model, is computed as its parent does; None if by kernels."""
    reason = why_not_cuda(device)  # the cheap question first: a CPU asks at every step
    if reason is not None:
        return reason
    if trace is not NO_TRACE:
        return "a trace or patch looks into it"
    dtype = next(layer.parameters()).dtype
    reason = why_no_kernel(device, dtype)
    if reason is not None:
        return reason
    parts = list(layer.children())
    if any(isinstance(part, Attention) and part.attention != "sdpa" for part in parts):
        return "eager attention was asked for"
    change = find_change(layer, _KINDS, path)
    return change or why_no_norm([part for part in parts if isinstance(part, nn.LayerNorm)], dtype)


class _Projected:
    """Stands in for an `Attention` whose keys and values are known already, for a `KeySource`."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.known = keys, values

    def keys_values(self, x: Tensor, trace: Trace = NO_TRACE) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self.known


def _attend(attention: Attention, x: Tensor, source: KeySource) -> Tensor:
    """Return what `Attention.forward` gives for x (B, T, D)."""
    queries = source.as_queries(x)
    three = _project_together(attention, queries) if type(source) in (Itself, OwnPast) else None
    if three is None:
        query = _split(attention, attention.q_proj(queries))
        keys, values, mask, causal = source.keys_values(attention, queries, NO_TRACE)
    else:
        query, *both = (_split(attention, part) for part in three)
        known: Any = _Projected(*both)
        keys, values, mask, causal = source.keys_values(known, queries, NO_TRACE)
    mixed = _mix(query, keys, values, mask, causal)  # (B, heads, T, d)
    return cast(Tensor, attention.out_proj(mixed.transpose(1, 2).flatten(2))).reshape(x.shape)


def _project_together(attention: Attention, x: Tensor) -> tuple[Tensor, ...] | None:
    """Return the queries, keys and values of x, (B, T, heads·d) each, by one product; None where they lie apart."""
    together = joint_map(attention)
    if together is None:
        return None
    sizes = [len(each.weight) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return torch.split(nn.functional.linear(x, *together), sizes, dim=-1)


def _split(attention: Attention, x: Tensor) -> Tensor:
    """(B, T, heads·d) -> (B, heads, T, d)"""
    return x.view(*x.shape[:2], attention.heads, -1).transpose(1, 2)


def _mix(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return what `attend` gives, by the kernel for few queries where that is possible."""
    from florence2.fast.cuda.kernels.decode_attention import FEW_QUERIES, WIDEST_HEAD, attend_few

    if (
        not causal
        and query.shape[2] <= FEW_QUERIES
        and query.shape[3] <= WIDEST_HEAD
        and are_plain(query, keys, values)
    ):
        return attend_few(query, keys, values, mask)
    return attend(query, keys, values, mask, causal=causal)


def _add_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> Tensor:
    from florence2.fast.cuda.kernels.norm import add_norm

    return add_norm(x, y, norm.weight, norm.bias, norm.eps, keep=False)[1]


def _mlp(layer: EncoderLayer | DecoderLayer, x: Tensor) -> Tensor:
    from florence2.fast.cuda.kernels.gelu import gelu_

    hidden = layer.fc1(x)
    return cast(Tensor, layer.fc2(gelu_(hidden) if layer.activation is gelu else layer.activation(hidden)))
