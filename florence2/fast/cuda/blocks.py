"""The blocks of DaViT with fused kernels: the numbers of `model.davit` with fewer passes over memory.

On an H200 60 % of the vision tower's time went into LayerNorms, copies into and out of windows, residuals, and GELU:
each reads and writes a whole grid. Here a residual, its LayerNorm and the cut into windows are one pass, windows are
added to the grid from where they lie, and GELU works in place. `fast.bands` chooses between this and the parents. The
gain was not measured yet.
"""

from typing import cast

from torch import Tensor

from florence2.model.attention import attend, gelu
from florence2.model.davit import ChannelBlock, Mlp, SpatialBlock, WindowAttention


def spatial_block(block: SpatialBlock, x: Tensor) -> Tensor:
    """Return what `SpatialBlock.forward` gives for x (B, H, W, C)."""
    from florence2.fast.cuda.kernels.join import join_add_
    from florence2.fast.cuda.kernels.norm import add_norm_split

    norm, window = block.norm1, block.window_attn.window
    x, windows = add_norm_split(x, block.conv1(x), norm.weight, norm.bias, norm.eps, window)
    return _add_rest(block, join_add_(x, _attend_in_windows(block.window_attn, windows), window))


def channel_block(block: ChannelBlock, x: Tensor) -> Tensor:
    """Return what `ChannelBlock.forward` gives for x (B, H, W, C)."""
    from florence2.fast.cuda.kernels.norm import add_norm

    norm = block.norm1
    total, normed = add_norm(x, block.conv1(x), norm.weight, norm.bias, norm.eps)
    return _add_rest(block, cast(Tensor, total).add_(block.channel_attn(normed)))


def _add_rest(block: SpatialBlock | ChannelBlock, x: Tensor) -> Tensor:
    """Add the second convolution and the MLP."""
    from florence2.fast.cuda.kernels.norm import add_norm

    norm = block.norm2
    total, normed = add_norm(x, block.conv2(x), norm.weight, norm.bias, norm.eps)
    return cast(Tensor, total).add_(_mlp(block.ffn, normed))


def _mlp(mlp: Mlp, x: Tensor) -> Tensor:
    from florence2.fast.cuda.kernels.gelu import gelu_

    hidden = mlp.fc1(x)
    return cast(Tensor, mlp.fc2(gelu_(hidden) if mlp.activation is gelu else mlp.activation(hidden)))


def _attend_in_windows(attention: WindowAttention, windows: Tensor) -> Tensor:
    """Attend inside windows (B·windows, window², C), as `WindowAttention.forward` does between cut and join."""
    qkv = attention.qkv(windows).unflatten(-1, (3, attention.heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B·windows, heads, window², C / heads) each
    out = attend(query, key, value)
    return cast(Tensor, attention.proj(out.transpose(1, 2).flatten(2)))  # (B·windows, window², C)
