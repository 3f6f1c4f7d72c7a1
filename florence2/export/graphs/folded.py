"""Channel attention with value, attention weights and output projection folded into one linear map.

Once the attention weights of an image are known, every position goes through the same three products. `fast.bands` does
the same on torch. In onnxruntime, the vision tower of base took 3.51 s of one core for 768 x 768 pixels plain, and 3.38
s with every block folded (the best of two runs in turns; Intel Xeon, Sapphire Rapids). Where there are fewer positions
than 2C, folding costs more than it saves, so these blocks stay plain; that form was not timed with the others.
"""

import copy
from typing import cast

from torch import Tensor, nn

from florence2.model.davit import ChannelAttention, ChannelBlock, ConvEmbed, DaViT
from florence2.model.trace import NO_TRACE, Trace


class FoldedChannelAttention(nn.Module):
    """Stands in for `ChannelAttention`, over whose parameters it computes the same: (B, H, W, C) -> same."""

    def __init__(self, plain: ChannelAttention):
        super().__init__()
        self.groups, self.proj = plain.groups, plain.proj
        C = plain.proj.weight.shape[1]
        weight, bias = plain.qkv.weight.detach(), plain.qkv.bias
        self.query_key = _linear(weight[: 2 * C], None if bias is None else bias.detach()[: 2 * C])
        self.value = _linear(weight[2 * C :], None if bias is None else bias.detach()[2 * C :])

    def forward(self, x: Tensor, trace: Trace = NO_TRACE) -> Tensor:  # noqa: ARG002
        B, H, W, C = x.shape
        G, d = self.groups, C // self.groups
        query_key = self.query_key(x).view(B, H, W, 2, G, d)
        query, key = query_key.permute(3, 0, 4, 1, 2, 5)  # each (B, G, H, W, d)
        # scaled and summed as in ChannelAttention
        scores = ((query * (H * W) ** -0.5).transpose(-2, -1) @ key).sum(dim=2)  # (B, G, d, d)
        by_group = self.proj.weight.view(C, G, d).transpose(0, 1) @ scores.softmax(dim=-1)  # (B, G, C, d)
        mixing = by_group.transpose(1, 2).reshape(B, C, C)
        folded = (mixing @ self.value.weight).transpose(1, 2)  # (B, C, C), for products from the right
        bias = self.proj.bias
        if self.value.bias is not None:
            bias = ((mixing * self.value.bias).sum(dim=-1) + bias)[:, None]  # (B, 1, C)
        out: Tensor = x.view(B, H * W, C) @ folded + bias
        return out.view(B, H, W, C)


def fold_channel_attention(tower: DaViT, height: int, width: int) -> DaViT:
    """Return a tower on the same parameters that folds in the stages where this is faster; `tower` stays as it is.

    `height` and `width` are those of the images, in pixels, for which it is to be faster.
    """
    shared = {id(tensor): tensor for tensor in (*tower.parameters(), *tower.buffers())}
    folded = copy.deepcopy(tower, shared)
    for conv, stage in zip(folded.convs, folded.blocks, strict=True):
        height, width = _grid(cast(ConvEmbed, conv).conv, height, width)
        for block in stage.modules():
            # of the last stage's few positions, folding would cost more than it saves
            if isinstance(block, ChannelBlock) and height * width >= 2 * block.channel_attn.proj.in_features:
                block.channel_attn = FoldedChannelAttention(block.channel_attn)  # type: ignore[assignment]
    return folded


def _grid(conv: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns that a convolution makes."""
    rows, columns = (
        (side + 2 * int(conv.padding[axis]) - conv.kernel_size[axis]) // conv.stride[axis] + 1
        for axis, side in enumerate((height, width))
    )
    return rows, columns


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
