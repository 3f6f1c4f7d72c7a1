"""Linear maps by the routine that is fastest for their shape on this machine, measured once a process.

Three routines give the same numbers up to rounding: `F.linear` (MKL on a CPU), the same product written as a 1 x 1
convolution over channels-last pixels (oneDNN), and, for the few rows of a decoder's step, oneDNN's product over a
weight in its own blocked order (`fast.packed`). Which is fastest depends on processor and shape: on an AMD EPYC (Zen
5) the convolution ran at 430 GFLOP/s where `F.linear` reached 200; on an Intel Xeon (Sapphire Rapids) they are equal.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.fast.packed import is_any_packed, is_plain, packed_product
from florence2.fast.unchanged import find_mode

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_MIN_ROWS = 32  # with fewer rows, preparing the convolution costs more than it saves
_MEASURED_ROWS = 256  # measure at most this many: the first image should not wait long for the choice
_ROUNDS = 3
_MARGIN = 1.3  # the convolution must be this much faster, so that noise does not decide between equals
_HAS_ONEDNN = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
_LINEAR_FORWARD = nn.Linear.forward
_IS_TORCHS = _LINEAR_FORWARD.__code__.co_filename == nn.Linear.__init__.__code__.co_filename  # when this was imported

_chosen: dict[tuple[int, ...], Product] = {}
"""The fastest routine by (threads, rows, in, out); rows are rounded up to a power of two."""


class Linear(nn.Linear):
    """Stands in for nn.Linear: (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        if is_replaced():
            return nn.Linear.forward(self, x)
        return linear(x, self.weight, self.bias)


def is_replaced() -> bool:
    """Return whether somebody replaced `nn.Linear.forward`, and so every linear map."""
    return not _IS_TORCHS or nn.Linear.forward is not _LINEAR_FORWARD


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `F.linear` gives, up to rounding: x (..., in), weight (out, in), bias (out) -> (..., out)."""
    if why_plain(x.device, x.dtype) is not None:
        return F.linear(x, weight, bias)
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same where the caller knows that `why_plain` has no reason."""
    rows = x.numel() // max(x.shape[-1], 1)
    if (rows < _MIN_ROWS and not is_any_packed()) or not _are_plain(x, weight, bias):
        return F.linear(x, weight, bias)
    packed = packed_product(x, weight, bias)
    if packed is not None:
        return packed
    if rows < _MIN_ROWS:
        return F.linear(x, weight, bias)
    key = (torch.get_num_threads(), 1 << (min(rows, _MEASURED_ROWS) - 1).bit_length(), *weight.shape)
    routine = _chosen.get(key)
    if routine is None:
        routine = _chosen.setdefault(key, _fastest(x.reshape(rows, -1)[:_MEASURED_ROWS], weight, bias))
    return routine(x, weight, bias)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same product as a convolution, which oneDNN computes."""
    rows = x.numel() // x.shape[-1]
    pixels = x.reshape(1, 1, rows, -1).permute(0, 3, 1, 2)  # (1, in, 1, rows), channels last: a view
    out = F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1)  # (1, 1, rows, out)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _are_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether oneDNN reads these tensors as torch does: no subclasses, no odd layouts, nothing empty."""
    if bias is not None and not (bias.shape == weight.shape[:1] and is_plain(bias) and bias.is_contiguous()):
        return False
    return is_plain(x) and is_plain(weight) and weight.dim() == 2


def why_plain(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return in words why `F.linear` is called; None where the fastest routine is chosen."""
    mode = find_mode()
    if mode is not None:
        return mode
    if not _HAS_ONEDNN:
        return "torch has no oneDNN for this processor"
    if device.type != "cpu":
        return f"the model is on {device.type}"
    if dtype != torch.float32:
        return f"the weights are {str(dtype).removeprefix('torch.')}, not float32"
    return None


def chosen_so_far() -> dict[str, int]:
    """Return for how many shapes each routine was chosen in this process."""
    products = list(_chosen.values())
    return {"F.linear": products.count(F.linear), "convolution": products.count(convolve)}


def _fastest(x: Tensor, weight: Tensor, bias: Tensor | None) -> Product:
    """Run both routines in turns and return the faster one, by the best time of each."""
    plain, convolution = F.linear, convolve
    best = {plain: float("inf"), convolution: float("inf")}
    for _ in range(_ROUNDS):
        for product in best:
            started = time.perf_counter()
            product(x, weight, bias)
            best[product] = min(best[product], time.perf_counter() - started)
    return convolution if best[convolution] * _MARGIN < best[plain] else plain
