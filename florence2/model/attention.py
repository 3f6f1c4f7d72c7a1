"""Scaled dot-product attention: torch's own kernel, and the same thing written out."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.model.trace import Trace, record

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
    trace: Trace | None = None,
) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v, over heads.

    `query` (B, heads, T, d); `key` and `value` (B, heads, S, d); `mask` bool, broadcastable to (B, heads, T, S),
    True where a query may look; `causal` lets query t look at keys up to t (then T must be S). `dropout` is the
    rate on the weights, 0 outside training. "sdpa" is torch's fused kernel; "eager" is the specification, and what
    runs when a trace wants the weights, recorded as "weights" (B, heads, T, S). Returns (B, heads, T, d), recorded
    as "heads".
    """
    if attention == "sdpa" and not (trace is not None and trace.wants("weights")):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return record(trace, "heads", out)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, heads, T, S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = record(trace, "weights", scores.softmax(dim=-1))
    return record(trace, "heads", F.dropout(weights, dropout, training=dropout > 0) @ value)
