"""The vision tower's convolutions in float32 on a CUDA device, in float32: the numbers of `torch.nn.Conv2d`.

By default torch lets cuDNN round the inputs of float32 convolutions to TF32, which keeps 10 of 23 bits of the fraction.
The switches for that belong to the process: to change them, even for the length of a call, changes what other threads
compute. Here every call says for itself that cuDNN is not to be used. torch then takes its own kernels: one for the
depthwise convolutions, which multiplies and adds in float32, and a matrix product for the strided ones, which is in
float32 unless the user has allowed TF32 for matrix products (`torch.set_float32_matmul_precision`). float16 and
bfloat16 go to cuDNN as before. On a GPU this was not measured yet.
"""

import torch
from torch import Tensor, nn

from florence2.fast.unchanged import find_mode, find_replaced_method, remember
from florence2.model.davit import DepthwiseConv


class Conv2d(nn.Conv2d):
    """Stands in for `torch.nn.Conv2d`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if why_plain(self, input.device, input.dtype) is None:
            return convolve(self, input, weight, bias)
        out: Tensor = super()._conv_forward(input, weight, bias)
        return out


class FastDepthwiseConv(Conv2d, DepthwiseConv):
    """Stands in for `DepthwiseConv`."""


_KINDS = remember(frozenset((Conv2d, FastDepthwiseConv)))


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what `conv` makes of x (B, C_in, H, W), without cuDNN, in the same layout in memory: channels last."""
    assert not isinstance(conv.padding, str)
    # the operator under F.conv2d, which takes as arguments what F.conv2d reads from the switches of the process
    out: Tensor = torch._convolution(
        x, weight, bias, conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups,
        benchmark=False, deterministic=False, cudnn_enabled=False, allow_tf32=False,
    )  # fmt: skip
    # torch's own kernels write channels first; the blocks permute the result and expect contiguous rows of channels
    return out.contiguous(memory_format=torch.channels_last)


def why_plain(conv: nn.Conv2d, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return in words why a convolution is computed as its parent does; None if without cuDNN."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if dtype != torch.float32:
        return f"the weights are {str(dtype).removeprefix('torch.')}, not float32"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"its padding is {conv.padding_mode}, {conv.padding}"
    mode = find_mode()
    if mode is not None:
        return mode
    method = find_replaced_method(_KINDS)
    return None if method is None else f"{method} was replaced"
