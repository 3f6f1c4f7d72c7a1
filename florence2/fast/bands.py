"""The blocks of DaViT on a CPU, one band of rows after another: the numbers of `model.davit`, with fewer page faults.

Tensors between the parts of a block are as large as 75 MB for one image. In bands that stay in the cache, and in place,
base at 768 px took 1.6 s instead of 2.8 s on two cores of an AMD EPYC (Zen 5), together with `fast.linear`.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from florence2.fast.cuda import blocks
from florence2.fast.cuda.convolutions import FastDepthwiseConv
from florence2.fast.cuda.kernels.availability import why_no_kernel, why_no_norm
from florence2.fast.linear import Linear, linear
from florence2.fast.packed import is_plain
from florence2.fast.unchanged import find_change, remember
from florence2.model.davit import (
    ChannelAttention,
    ChannelBlock,
    DepthwiseConv,
    Mlp,
    SpatialBlock,
    WindowAttention,
)
from florence2.model.trace import NO_TRACE, Trace

BAND_POSITIONS = 4608  # of the first stage of base these make 9 MB inside the MLP, about what the cache holds


class BandedSpatialBlock(SpatialBlock):
    """Stands in for `SpatialBlock`: by bands on a CPU, by kernels on a CUDA device (`fast.cuda.blocks`)."""

    def forward(self, x: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        """Compute the block by bands or kernels, or as its parent does where anything in it was changed."""
        if not is_plain(x) or why_plain(self, x.device, trace) is not None:
            return super().forward(x, trace)
        if _takes_kernels(self, x.device):
            return blocks.spatial_block(self, x)
        x = self.conv1(x).add_(x)
        for band in bands(x, self.window_attn.window):
            band += self.window_attn(self.norm1(band))
        return _add_rest(self, x)


class BandedChannelBlock(ChannelBlock):
    """Stands in for `ChannelBlock`: by bands on a CPU, by kernels on a CUDA device (`fast.cuda.blocks`)."""

    def forward(self, x: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        """Compute the block by bands or kernels, or as its parent does where anything in it was changed."""
        if not is_plain(x) or why_plain(self, x.device, trace) is not None:
            return super().forward(x, trace)
        if _takes_kernels(self, x.device):
            return blocks.channel_block(self, x)
        x = self.conv1(x).add_(x)
        for row in range(len(x)):
            _add_channel_attention(self.channel_attn, x[row : row + 1], self.norm1)
        return _add_rest(self, x)


_KINDS = remember(
    frozenset(
        (
            BandedSpatialBlock,
            BandedChannelBlock,
            DepthwiseConv,
            FastDepthwiseConv,
            Mlp,
            WindowAttention,
            ChannelAttention,
            Linear,
            nn.LayerNorm,
        )
    )
)


def why_plain(block: SpatialBlock | ChannelBlock, device: torch.device, trace: Trace, path: str = "") -> str | None:
    """Return in words why a block, at `path` in the model, is computed as its parent does; None if faster."""
    if trace is not NO_TRACE:
        return "a trace or patch looks into it"
    if block.attention != "sdpa":
        return "eager attention was asked for"
    dtype = next(block.parameters()).dtype
    if device.type != "cpu" and (reason := why_no_kernel(device, dtype)) is not None:
        return reason if device.type in reason else f"the model is on {device.type}, and {reason}"
    change = find_change(block, _KINDS, path)
    return change or (None if device.type == "cpu" else why_no_norm([block.norm1, block.norm2], dtype))


def _takes_kernels(block: SpatialBlock | ChannelBlock, device: torch.device) -> bool:
    """Return whether an unchanged block is computed by kernels."""
    dtype = block.norm1.weight.dtype
    return why_no_kernel(device, dtype) is None and why_no_norm([block.norm1, block.norm2], dtype) is None


def _add_rest(block: SpatialBlock | ChannelBlock, x: Tensor) -> Tensor:
    """Add the second convolution and the MLP, in place."""
    x = block.conv2(x).add_(x)
    for band in bands(x):
        band += block.ffn(block.norm2(band))
    return x


def _add_channel_attention(attention: ChannelAttention, image: Tensor, norm: nn.LayerNorm) -> None:
    """image (1, H, W, C) += attention(norm(image)), in place."""
    positions, channels = image.shape[1] * image.shape[2], image.shape[3]
    if positions < 2 * channels:  # the last stage: folding would cost more than it saves
        image += attention(norm(image))
        return
    scores = torch.stack([_scores(attention, norm(band), positions) for band in bands(image)]).sum(0)
    weight, bias = _fold(attention, scores.softmax(dim=-1))
    for band in bands(image):
        band += linear(norm(band), weight, bias)


def _scores(attention: ChannelAttention, x: Tensor, positions: int) -> Tensor:
    """Return what x (1, h, W, C), some of all `positions`, contributes to the scores: (G, C / G, C / G)."""
    _, h, W, C = x.shape
    bias = None if attention.qkv.bias is None else attention.qkv.bias[: 2 * C]
    query_key = linear(x, attention.qkv.weight[: 2 * C], bias).view(h, W, 2, attention.groups, C // attention.groups)
    query, key = query_key.permute(2, 3, 0, 1, 4)  # each (G, h, W, C / G)
    # scaled first, as in ChannelAttention
    return cast(Tensor, ((query * positions**-0.5).transpose(-2, -1) @ key).sum(dim=1))


def _fold(attention: ChannelAttention, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """Join value, attention and output projection to one linear map: (C, C) and (C,).

    Once the attention weights (G, C / G, C / G) are known, every position goes through the same three products.
    """
    C, groups = attention.proj.weight.shape[0], attention.groups
    by_group = attention.proj.weight.view(C, groups, C // groups).transpose(0, 1) @ weights
    mixing = by_group.transpose(0, 1).reshape(C, C)
    bias: Tensor | None = attention.proj.bias
    if attention.qkv.bias is not None:
        mixed = mixing @ attention.qkv.bias[2 * C :]
        bias = mixed if bias is None else bias + mixed
    return linear(mixing, attention.qkv.weight[2 * C :].t()), bias


def bands(x: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """Yield views (1, h, W, C) of x (B, H, W, C): rows of one image each, h a multiple of `multiple`, or the rest."""
    rows = max(1, BAND_POSITIONS // (x.shape[2] * multiple)) * multiple
    for image in x.unbind():
        for start in range(0, x.shape[1], rows):
            yield image[None, start : start + rows]
