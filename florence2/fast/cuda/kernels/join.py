"""Windows put back into the grid and added to it, in one pass: the end of window attention in `model.davit`."""

import triton
import triton.language as tl
from torch import Tensor

from florence2.fast.cuda.kernels.availability import on_device_of
from florence2.model.davit import join_windows

_TILE = 2048  # values that a program adds at a time


def join_add_plain(x: Tensor, windows: Tensor, window: int) -> Tensor:
    """Return x (B, H, W, C) + windows (B·windows, window², C) without their padding: the specification."""
    H, W = x.shape[1:3]
    return x + join_windows(windows, window, H + -H % window, W + -W % window)[:, :H, :W]


def join_add_(x: Tensor, windows: Tensor, window: int) -> Tensor:
    """Do the same in place, in `x`, which must be contiguous."""
    B, H, W, C = x.shape
    windows = windows.contiguous()
    rows, width = B * H * W, triton.next_power_of_2(C)
    together = max(1, _TILE // width)
    sizes = (rows, H, W, C, triton.cdiv(H, window), triton.cdiv(W, window), window)
    with on_device_of(x):
        _join_add[(triton.cdiv(rows, together),)](x, windows, *sizes, ROWS=together, WIDTH=width)
    return x


@triton.jit
def _join_add(x_ptr, windows_ptr, rows, H, W, C, down, across, window, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # a position of the grid
    column = tl.arange(0, WIDTH)
    w, h, image = row % W, row // W % H, row // (W * H)
    which = (image * down + h // window) * across + w // window
    source = (which * window + h % window) * window + w % window
    inside = (row < rows)[:, None] & (column < C)[None, :]
    place = row.to(tl.int64)[:, None] * C + column[None, :]
    added = tl.load(windows_ptr + source.to(tl.int64)[:, None] * C + column[None, :], mask=inside)
    total = tl.load(x_ptr + place, mask=inside).to(tl.float32) + added.to(tl.float32)
    tl.store(x_ptr + place, total.to(x_ptr.dtype.element_ty), mask=inside)
