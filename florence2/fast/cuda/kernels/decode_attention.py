"""Attention of few queries, the K beams of an image, over many keys: `model.attention.attend` in a decoder's step.

Torch's kernels are made for long queries. Here a program reads the keys and values of one head once for all beams, in
blocks, and keeps a running maximum and sum (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). Products
and softmax are float32. Keys and values that no query may see are not read, so empty slots cost nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence2.fast.cuda.kernels.availability import on_device_of

FEW_QUERIES = 16
WIDEST_HEAD = 256
_TILE = 8192  # products that a program holds at a time: queries x keys x width


def attend_few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what `attend` gives, (B, heads, K, d), for K up to `FEW_QUERIES` and d up to `WIDEST_HEAD`.

    `query` (B, heads, K, d); `key` and `value` (B, heads, S, d); `mask` bool, broadcastable to (B, heads, K, S). A
    query that may look nowhere gives zeros.
    """
    B, heads, K, d = query.shape
    S = key.shape[2]
    out = query.new_empty(B, K, heads, d).transpose(1, 2)  # (B, heads, K, d), laid out as the output projection reads
    seen = None if mask is None else mask.view(torch.uint8).expand(B, heads, K, S)
    strides = [tensor.stride()[axis] for tensor in (query, key, value, out) for axis in range(4)]
    strides += [0] * 4 if seen is None else seen.stride()
    queries, width = triton.next_power_of_2(K), triton.next_power_of_2(d)
    keys = max(16, min(128, _TILE // (queries * width)))
    with on_device_of(query):
        _attend_few[(B * heads,)](
            *(query, key, value, out, seen, heads, K, S, d, d**-0.5, *strides),
            MASKED=seen is not None,
            QUERIES=queries,
            KEYS=keys,
            WIDTH=width,
        )
    return out


@triton.jit
def _attend_few(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    mask_ptr,
    heads,
    K,
    S,
    d,
    scale,
    query_b,
    query_h,
    query_k,
    query_d,
    key_b,
    key_h,
    key_s,
    key_d,
    value_b,
    value_h,
    value_s,
    value_d,
    out_b,
    out_h,
    out_k,
    out_d,
    mask_b,
    mask_h,
    mask_k,
    mask_s,
    MASKED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    image = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    k = tl.arange(0, QUERIES)
    column = tl.arange(0, WIDTH)
    inside = (k < K)[:, None] & (column < d)[None, :]
    query_ptr += image * query_b + head * query_h
    key_ptr += image * key_b + head * key_h
    value_ptr += image * value_b + head * value_h
    out_ptr += image * out_b + head * out_h
    query = tl.load(query_ptr + k[:, None] * query_k + column[None, :] * query_d, mask=inside, other=0.0)
    query = query.to(tl.float32) * scale
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, S, KEYS):
        s = start + tl.arange(0, KEYS)
        seen = (k < K)[:, None] & (s < S)[None, :]
        if MASKED:
            place = image * mask_b + head * mask_h + k[:, None] * mask_k + s[None, :] * mask_s
            seen = seen & (tl.load(mask_ptr + place, mask=seen, other=0) != 0)
        needed = (tl.max(seen.to(tl.int32), axis=0) > 0)[:, None] & (column < d)[None, :]
        key = tl.load(key_ptr + s[:, None] * key_s + column[None, :] * key_d, mask=needed, other=0.0).to(tl.float32)
        value = tl.load(value_ptr + s[:, None] * value_s + column[None, :] * value_d, mask=needed, other=0.0)
        scores = tl.sum(query[:, None, :] * key[None, :, :], axis=2)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far: -inf - -inf would be NaN
        weights = tl.exp(scores - finite[:, None])
        shrunk = tl.exp(top - finite)
        total = total * shrunk + tl.sum(weights, axis=1)
        added = tl.sum(weights[:, :, None] * value.to(tl.float32)[None, :, :], axis=1)
        mixed = mixed * shrunk[:, None] + added
        top = new_top
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    place = k[:, None] * out_k + column[None, :] * out_d
    tl.store(out_ptr + place, mixed.to(out_ptr.dtype.element_ty), mask=inside)
