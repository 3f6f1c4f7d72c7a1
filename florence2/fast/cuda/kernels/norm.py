"""x + y and its LayerNorm in one pass over memory, cut into windows if asked for.

The plain lines are those of `model.bart` (post-norm: only the normalised sum is needed) and of `model.davit` (pre-norm:
the sum is the residual stream and is kept). The sum and the statistics of the LayerNorm are float32 whatever the type
of the tensors; the plain lines round the sum to that type first.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from florence2.fast.cuda.kernels.availability import on_device_of
from florence2.model.davit import split_windows

_TILE = 2048  # values that a program normalises at a time, several short rows or one long one


def add_norm_plain(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + y (..., C) and its LayerNorm: the specification of `add_norm`."""
    total = x + y
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def add_norm_split_plain(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, window: int
) -> tuple[Tensor, Tensor]:
    """Return x + y (B, H, W, C) and its LayerNorm in windows: the specification of `add_norm_split`."""
    total, normed = add_norm_plain(x, y, weight, bias, eps)
    H, W = x.shape[1:3]
    return total, split_windows(F.pad(normed, (0, 0, 0, -W % window, 0, -H % window)), window)


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, keep: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Return x + y (..., C), None unless `keep`, and its LayerNorm."""
    x, y = x.contiguous(), y.contiguous()
    C = x.shape[-1]
    total, normed = torch.empty_like(x) if keep else None, torch.empty_like(x)
    rows, width = x.numel() // C, triton.next_power_of_2(C)
    together = max(1, _TILE // width)
    with on_device_of(x):
        _add_norm[(triton.cdiv(rows, together),)](
            x, y, weight, bias, total, normed, eps, rows, C, KEEP=keep, ROWS=together, WIDTH=width
        )
    return total, normed


def add_norm_split(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, window: int
) -> tuple[Tensor, Tensor]:
    """Return x + y (B, H, W, C), and its LayerNorm in windows (B·windows, window², C), zeros beyond the grid."""
    x, y = x.contiguous(), y.contiguous()
    B, H, W, C = x.shape
    down, across = triton.cdiv(H, window), triton.cdiv(W, window)
    total, windows = torch.empty_like(x), x.new_empty(B * down * across, window * window, C)
    rows, width = len(windows) * window * window, triton.next_power_of_2(C)
    together = max(1, _TILE // width)
    with on_device_of(x):
        _add_norm_split[(triton.cdiv(rows, together),)](
            *(x, y, weight, bias, total, windows, eps, rows, H, W, C),
            *(down, across, window),
            ROWS=together,
            WIDTH=width,
        )
    return total, windows


@triton.jit
def _normalise(total, inside, column, weight_ptr, bias_ptr, eps, C):
    """LayerNorm of the first C columns of rows (ROWS, WIDTH), float32; `inside` is True there."""
    mean = tl.sum(total, axis=1) / C
    centred = tl.where(inside, total - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / C
    scale = 1.0 / tl.sqrt(variance + eps)
    weight = tl.load(weight_ptr + column, mask=column < C).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < C).to(tl.float32)
    return centred * scale[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _add_norm(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    normed_ptr,
    eps,
    rows,
    C,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    place = row.to(tl.int64)[:, None] * C + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    total = x + tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(total_ptr + place, total.to(total_ptr.dtype.element_ty), mask=inside)
    normed = _normalise(total, inside, column, weight_ptr, bias_ptr, eps, C)
    tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_split(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    windows_ptr,
    eps,
    rows,
    H,
    W,
    C,
    down,
    across,
    window,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # a row is a position of a window, so that rows beyond the grid, which hold zeros, are written as well
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    area = window * window
    which = row // area
    h = which // across % down * window + row % area // window
    w = which % across * window + row % window
    real = (row < rows) & (h < H) & (w < W)
    position = (which // (across * down) * H + h) * W + w
    inside = real[:, None] & (column < C)[None, :]
    place = position.to(tl.int64)[:, None] * C + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    total = x + tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_ptr + place, total.to(total_ptr.dtype.element_ty), mask=inside)
    normed = tl.where(inside, _normalise(total, inside, column, weight_ptr, bias_ptr, eps, C), 0.0)
    written = (row < rows)[:, None] & (column < C)[None, :]
    place = row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(windows_ptr + place, normed.to(windows_ptr.dtype.element_ty), mask=written)
