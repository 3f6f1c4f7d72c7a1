"""The functions that both towers share.

Scaled dot-product attention, by torch's own kernel or written out, and the activations of their MLPs.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.model.trace import NO_TRACE, Trace

AttentionKind = Literal["sdpa", "eager"]


def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU, x Φ(x), of the published checkpoints."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU with Φ approximated by a tanh, as GPT-2 does."""
    return F.gelu(x, approximate="tanh")


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0)."""
    return F.relu(x)


def silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x)."""
    return F.silu(x)


Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "silu": silu,
}
"""By the names of transformers; the keys are `config.ACTIVATION_NAMES`, which needs no torch."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    attention: AttentionKind = "sdpa",
    trace: Trace = NO_TRACE,
) -> Tensor:
    """Return softmax(q kᵀ / sqrt(d)) v, over heads.

    Args:
        query: (B, heads, T, d).
        key: (B, heads, S, d).
        value: (B, heads, S, d).
        mask: bool, broadcastable to (B, heads, T, S), True where a query may look.
        causal: let query t look at keys up to t only; then T must be S.
        dropout: rate on the attention weights, 0 outside training.
        attention: "sdpa" is torch's fused kernel, "eager" the specification.
        trace: sees "weights" (B, heads, T, S), for which the specification is computed, and "heads", the result.

    Returns:
        (B, heads, T, d).
    """
    if attention == "sdpa" and not trace.wants("weights"):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return trace("heads", out)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, heads, T, S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = trace("weights", scores.softmax(dim=-1))
    # said to be off at rate 0, so that an exporter writes nothing for it
    return trace("heads", F.dropout(weights, dropout, training=dropout > 0) @ value)
