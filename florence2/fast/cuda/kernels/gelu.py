"""The exact GELU in place: `model.attention.gelu` without a second tensor.

The bias before it stays with the product, whose own kernel adds it at no cost.
"""

import triton
import triton.language as tl
from torch import Tensor

from florence2.fast.cuda.kernels.availability import on_device_of

_BLOCK = 1024


def gelu_(x: Tensor) -> Tensor:
    """Replace x, which must be contiguous, by x Φ(x), computed in float32; return it."""
    count = x.numel()
    with on_device_of(x):
        _gelu[(triton.cdiv(count, _BLOCK),)](x, count, BLOCK=_BLOCK)
    return x


@triton.jit
def _gelu(x_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count).to(tl.float32)
    out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(x_ptr + place, out.to(x_ptr.dtype.element_ty), mask=place < count)
