"""Scaled dot-product attention: torch's own kernel, and the same thing written out."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.model.trace import NO_TRACE, Trace

AttentionKind = Literal["sdpa", "eager"]


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
    return trace("heads", F.dropout(weights, dropout, training=dropout > 0) @ value)
