"""DaViT, the vision tower: (B, 3, H, W) -> (B, h, w, C).

Dual Attention Vision Transformers (Ding et al., ECCV 2022, https://arxiv.org/abs/2204.03645), section 3, with the
depthwise convolutions and the per-stage settings of Florence-2. There are four stages; each begins with a strided
convolution, then come pairs of a spatial block (attention among the positions of a window) and a channel block
(attention among the channels of a group). Between modules, tensors are channels-last: (B, H, W, C).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.model.attention import ACTIVATIONS, AttentionKind, attend
from florence2.model.config import VisionConfig
from florence2.model.trace import NO_TRACE, Trace


class DaViT(nn.Module):
    """The four stages. `pixel_values` (B, 3, H, W) -> grid (B, h, w, C), h = H / 32 and w = W / 32 as published."""

    def __init__(self, config: VisionConfig, attention: AttentionKind = "sdpa"):
        super().__init__()
        # the deeper a block, the more often training skips it: the rate grows linearly from 0 over all blocks
        rates = iter(torch.linspace(0, config.drop_path_rate, 2 * sum(config.depths), device="cpu").tolist())
        self.convs = nn.ModuleList(ConvEmbed(config, stage) for stage in range(len(config.depths)))
        self.blocks = nn.ModuleList(
            nn.ModuleList(DualBlock(config, stage, next(rates), next(rates), attention) for _ in range(depth))
            for stage, depth in enumerate(config.depths)
        )

    def forward(self, pixel_values: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        """Run the stages one after another."""
        x = pixel_values.permute(0, 2, 3, 1)  # (B, H, W, 3)
        for stage, conv in enumerate(self.convs):
            x = trace(f"convs.{stage}", conv(x))
            blocks = self.blocks[stage]
            assert isinstance(blocks, nn.ModuleList)
            for i, block in enumerate(blocks):
                x = block(x, trace.at(f"blocks.{stage}.{i}"))
        return x


class ConvEmbed(nn.Module):
    """A strided convolution that makes the grid coarser, with LayerNorm before or after it.

    (B, H, W, C_in) -> (B, H', W', C_out)
    """

    def __init__(self, config: VisionConfig, stage: int):
        super().__init__()
        channels_in = 3 if stage == 0 else config.dim_embed[stage - 1]
        channels_out = config.dim_embed[stage]
        self.prenorm = config.patch_prenorm[stage]
        self.conv = nn.Conv2d(
            channels_in, channels_out, config.patch_size[stage], config.patch_stride[stage], config.patch_padding[stage]
        )
        self.norm = nn.LayerNorm(channels_in if self.prenorm else channels_out)

    def forward(self, x: Tensor) -> Tensor:
        # the first stage normalises after its convolution: pixels are normalised already
        x = self.norm(x) if self.prenorm else x
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H', W', C_out)
        return x if self.prenorm else self.norm(x)


class DualBlock(nn.Module):
    """A spatial block, then a channel block: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self, config: VisionConfig, stage: int, spatial_rate: float, channel_rate: float, attention: AttentionKind
    ):
        super().__init__()
        self.spatial_block = SpatialBlock(config, stage, spatial_rate, attention)
        self.channel_block = ChannelBlock(config, stage, channel_rate, attention)

    def forward(self, x: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        x = trace("spatial_block", self.spatial_block(x, trace.at("spatial_block")))
        return trace("channel_block", self.channel_block(x, trace.at("channel_block")))


class _Block(nn.Module):
    """Convolution, attention, convolution, MLP, each added to its input. A subclass names its attention module."""

    attention_name: str

    def __init__(self, config: VisionConfig, stage: int, drop_path_rate: float, attention: AttentionKind):
        super().__init__()
        channels = config.dim_embed[stage]
        self.drop_path_rate, self.attention = drop_path_rate, attention
        self.conv1 = DepthwiseConv(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.conv2 = DepthwiseConv(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = Mlp(channels, int(channels * config.mlp_ratio), config.activation_function)

    def forward(self, x: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        name = self.attention_name
        # no position embedding: the convolutions tell a position where it is, and need no LayerNorm
        x = trace("conv1", x + self.conv1(x))
        # pre-norm: the residual stream is never normalised, and grows with depth
        mixed = trace(name, getattr(self, name)(self.norm1(x), trace.at(name)))
        x = trace("after_attention", x + self._drop_path(mixed))
        x = trace("conv2", x + self.conv2(x))
        return x + self._drop_path(trace("ffn", self.ffn(self.norm2(x), trace.at("ffn"))))

    def _drop_path(self, branch: Tensor) -> Tensor:
        """Apply stochastic depth: in training, skip the branch for some images of the batch, and scale the rest."""
        if not self.training or self.drop_path_rate == 0.0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, 1, device=branch.device) >= self.drop_path_rate
        return branch * (keep / (1.0 - self.drop_path_rate)).to(branch.dtype)


class SpatialBlock(_Block):
    """Attention among positions (paper section 3.1)."""

    attention_name = "window_attn"

    def __init__(self, config: VisionConfig, stage: int, drop_path_rate: float, attention: AttentionKind):
        super().__init__(config, stage, drop_path_rate, attention)
        self.window_attn = WindowAttention(
            config.dim_embed[stage], config.num_heads[stage], config.window_size, config.qkv_bias, attention
        )


class ChannelBlock(_Block):
    """Attention among channels (paper section 3.2)."""

    attention_name = "channel_attn"

    def __init__(self, config: VisionConfig, stage: int, drop_path_rate: float, attention: AttentionKind):
        super().__init__(config, stage, drop_path_rate, attention)
        self.channel_attn = ChannelAttention(config.dim_embed[stage], config.num_groups[stage], config.qkv_bias)


class DepthwiseConv(nn.Conv2d):
    """A 3 x 3 convolution of each channel by itself: it mixes a position with its neighbours."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        # torch convolves channels-first tensors; the permutations are views, so channels stay last in memory
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, W, C)


class Mlp(nn.Module):
    """Two linear maps with an activation between them, applied to every position."""

    def __init__(self, channels: int, hidden: int, activation: str = "gelu"):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        out: Tensor = self.fc2(trace("hidden", self.activation(trace("before", self.fc1(x)))))
        return out


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of `window` x `window` positions: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, heads: int, window: int, qkv_bias: bool, attention: AttentionKind = "sdpa"):
        super().__init__()
        self.heads, self.window, self.attention = heads, window, attention
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        H, W, C = x.shape[1:]
        # Zeros on the right and at the bottom where the window does not divide the grid (at 768 px it always does).
        # They are not masked: their keys and values are the biases, and real positions attend to them, as in the
        # reference.
        x = F.pad(x, (0, 0, 0, -W % self.window, 0, -H % self.window))
        windows = split_windows(x, self.window)  # (B·windows, window², C)
        # no relative position bias, unlike in Swin: the depthwise convolutions take its place
        qkv = self.qkv(windows).view(-1, self.window**2, 3, self.heads, C // self.heads)
        query, key, value = _record_three(trace, qkv.permute(2, 0, 3, 1, 4))  # (B·windows, heads, window², C / heads)
        out = attend(query, key, value, attention=self.attention, trace=trace)
        out = self.proj(out.transpose(1, 2).flatten(2))  # (B·windows, window², C)
        return join_windows(out, self.window, x.shape[1], x.shape[2])[:, :H, :W]


class ChannelAttention(nn.Module):
    """Attention whose tokens are the channels of a group and whose features are positions: (B, H, W, C) -> same.

    The softmax is over C/G x C/G scores, so the cost is linear in the number of positions. No fused kernel takes
    36,864 positions as the head dimension, so this is written out.
    """

    def __init__(self, channels: int, groups: int, qkv_bias: bool):
        super().__init__()
        self.groups = groups
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).view(B, H, W, 3, self.groups, C // self.groups)
        query, key, value = _record_three(trace, qkv.permute(3, 0, 4, 1, 2, 5))  # each (B, G, H, W, C / G)
        # Scaled by the number of positions, the head dimension here, where the paper has the channels of a head.
        # Summed within rows of the grid first and then over rows: one sum over all 36,864 positions of the first stage
        # would cost float32 a digit.
        scores = ((query * (H * W) ** -0.5).transpose(-2, -1) @ key).sum(dim=2)  # (B, G, C / G, C / G)
        weights = trace("weights", scores.softmax(dim=-1))
        out = trace("heads", value.flatten(2, 3) @ weights.transpose(-2, -1))  # (B, G, H·W, C / G)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(B, H, W, C))
        return mixed


def _record_three(trace: Trace, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv
    return trace("queries", query), trace("keys", key), trace("values", value)


def split_windows(x: Tensor, window: int) -> Tensor:
    """Cut the grid: (B, H, W, C) -> (B·windows, window², C); H and W must be multiples of `window`."""
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.transpose(2, 3).reshape(-1, window * window, C)  # (B, H / w, W / w, w, w, C) before the reshape


def join_windows(windows: Tensor, window: int, H: int, W: int) -> Tensor:
    """Invert `split_windows`: (B·windows, window², C) -> (B, H, W, C)."""
    C = windows.shape[-1]
    x = windows.view(-1, H // window, W // window, window, window, C)
    return x.transpose(2, 3).reshape(-1, H, W, C)
