"""Linear maps, sent on a CPU to the library that is fastest at them.

`F.linear` on a CPU is a matrix product by MKL, which on AMD processors runs at half of what they can do (base vision
tower on a Zen 5: 200 GFLOP/s). The same product written as a 1 x 1 convolution over channels-last pixels is done by
oneDNN, at 430 GFLOP/s there, with the same operations of torch that everybody uses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIN_ROWS = 32  # fewer rows than this, and preparing the convolution costs more than it saves
_ONEDNN = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


class Linear(nn.Linear):
    """nn.Linear with the faster product where there is one: (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N) -> (..., N), as `F.linear` up to rounding."""
    rows = x.numel() // x.shape[-1]
    if not _ONEDNN or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled() or rows < _MIN_ROWS:
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, 1, rows, -1).permute(0, 3, 1, 2)  # (1, K, 1, rows), channels last: a view
    out = F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1)  # (1, 1, rows, N)
    return out.reshape(*x.shape[:-1], weight.shape[0])
