"""DaViT, the vision tower: (B, 3, H, W) -> (B, h, w, C).

Dual Attention Vision Transformers (Ding et al., ECCV 2022, https://arxiv.org/abs/2204.03645), section 3, with the
depthwise convolutions and the per-stage settings of Florence-2. Four stages; each begins with a strided convolution
and goes on with pairs of a spatial block (attention among the positions of a window) and a channel block (attention
among the channels of a group). Between modules, tensors are channels-last: (B, H, W, C).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.fast.linear import Linear, linear
from florence2.fast.unchanged import may_bypass
from florence2.model.attention import AttentionKind, attend
from florence2.model.config import VisionConfig
from florence2.model.trace import Trace, record, scope


class DaViT(nn.Module):
    """The four stages. `pixel_values` (B, 3, H, W) -> grid (B, h, w, C), h = H / 32 and w = W / 32 as published."""

    def __init__(self, config: VisionConfig, attention: AttentionKind = "sdpa"):
        super().__init__()
        # stochastic depth grows linearly from 0 over all blocks, spatial and channel ones counted in turn
        rates = iter(torch.linspace(0, config.drop_path_rate, 2 * sum(config.depths), device="cpu").tolist())
        self.convs = nn.ModuleList(ConvEmbed(config, stage) for stage in range(len(config.depths)))
        self.blocks = nn.ModuleList(
            nn.ModuleList(DualBlock(config, stage, next(rates), next(rates), attention) for _ in range(depth))
            for stage, depth in enumerate(config.depths)
        )

    def forward(self, pixel_values: Tensor, trace: Trace | None = None) -> Tensor:
        x = pixel_values.permute(0, 2, 3, 1)  # (B, H, W, 3)
        for stage, conv in enumerate(self.convs):
            x = record(trace, f"convs.{stage}", conv(x))
            blocks = self.blocks[stage]
            assert isinstance(blocks, nn.ModuleList)
            for i, block in enumerate(blocks):
                x = block(x, scope(trace, f"blocks.{stage}.{i}"))
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
        x = self.norm(x) if self.prenorm else x
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x if self.prenorm else self.norm(x)


class DualBlock(nn.Module):
    """A spatial block, then a channel block: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self, config: VisionConfig, stage: int, spatial_rate: float, channel_rate: float, attention: AttentionKind
    ):
        super().__init__()
        self.spatial_block = SpatialBlock(config, stage, spatial_rate, attention)
        self.channel_block = ChannelBlock(config, stage, channel_rate, attention)

    def forward(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        x = record(trace, "spatial_block", self.spatial_block(x, scope(trace, "spatial_block")))
        return record(trace, "channel_block", self.channel_block(x, scope(trace, "channel_block")))


class _Block(nn.Module):
    """What both blocks share: convolution, attention, convolution, MLP, each added to its input.

    Only attention and MLP have a LayerNorm before them. A subclass names its attention module.
    """

    attention_name: str

    def __init__(self, config: VisionConfig, stage: int, drop_path_rate: float, attention: AttentionKind):
        super().__init__()
        channels = config.dim_embed[stage]
        self.drop_path_rate, self.attention = drop_path_rate, attention
        self.conv1 = DepthwiseConv(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.conv2 = DepthwiseConv(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = Mlp(channels, int(channels * config.mlp_ratio))

    def forward(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        if trace is None and self.attention == "sdpa" and x.device.type == "cpu" and may_bypass(self, _PARTS):
            return self._forward_by_bands(x)
        name = self.attention_name
        x = record(trace, "conv1", x + self.conv1(x))
        mixed = record(trace, name, getattr(self, name)(self.norm1(x), scope(trace, name)))
        x = record(trace, "after_attention", x + self._drop_path(mixed))
        x = record(trace, "conv2", x + self.conv2(x))
        return x + self._drop_path(record(trace, "ffn", self.ffn(self.norm2(x), scope(trace, "ffn"))))

    def _forward_by_bands(self, x: Tensor) -> Tensor:
        """The same, a band of rows after another and in place, so that what is between stays in the cache."""
        x = self.conv1(x).add_(x)
        getattr(self, self.attention_name).add_by_bands(x, self.norm1)
        x = self.conv2(x).add_(x)
        for band in bands(x):
            band += self.ffn(self.norm2(band))
        return x

    def _drop_path(self, branch: Tensor) -> Tensor:
        """Stochastic depth: in training, leave the branch out for some pictures of the batch, and scale the rest."""
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
    """A 3 x 3 convolution of each channel by itself: it tells a position where its neighbours are."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C); the permutations are views
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """Two linear maps with the exact GELU between them, on the last dimension."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        out: Tensor = self.fc2(record(trace, "hidden", F.gelu(self.fc1(x))))
        return out


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of `window` x `window` positions: (B, H, W, C) -> (B, H, W, C).

    A grid that the window does not divide is padded with zeros on the right and at the bottom. The padding is not
    masked: its keys and values are the biases, and real positions attend to them, as in the reference.
    """

    def __init__(self, channels: int, heads: int, window: int, qkv_bias: bool, attention: AttentionKind = "sdpa"):
        super().__init__()
        self.heads, self.window, self.attention = heads, window, attention
        self.qkv = Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        H, W, C = x.shape[1:]
        x = F.pad(x, (0, 0, 0, -W % self.window, 0, -H % self.window))
        windows = split_windows(x, self.window)  # (B·windows, window², C)
        qkv = self.qkv(windows).view(-1, self.window**2, 3, self.heads, C // self.heads)
        query, key, value = _record_three(trace, qkv.permute(2, 0, 3, 1, 4))  # (B·windows, heads, window², C / heads)
        out = attend(query, key, value, attention=self.attention, trace=trace)
        out = self.proj(out.transpose(1, 2).flatten(2))  # (B·windows, window², C)
        return join_windows(out, self.window, x.shape[1], x.shape[2])[:, :H, :W]

    def add_by_bands(self, x: Tensor, norm: nn.LayerNorm) -> None:
        """x += self(norm(x)), in place."""
        for band in bands(x, self.window):
            band += self(norm(band))


class ChannelAttention(nn.Module):
    """Attention whose tokens are the channels of a group and whose features are positions: (B, H, W, C) -> same.

    The softmax is over C/G x C/G scores, scaled by (number of positions)^-0.5. With positions as the head dimension
    no fused kernel fits, so this is written out.
    """

    def __init__(self, channels: int, groups: int, qkv_bias: bool):
        super().__init__()
        self.groups = groups
        self.qkv = Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).view(B, H, W, 3, self.groups, C // self.groups)
        query, key, value = _record_three(trace, qkv.permute(3, 0, 4, 1, 2, 5))  # each (B, G, H, W, C / G)
        # One sum over all positions (36,864 in the first stage) costs float32 a digit; row by row, then over rows,
        # it does not.
        scores = ((query * (H * W) ** -0.5).transpose(-2, -1) @ key).sum(dim=2)  # (B, G, C / G, C / G)
        weights = record(trace, "weights", scores.softmax(dim=-1))
        out = record(trace, "heads", value.flatten(2, 3) @ weights.transpose(-2, -1))  # (B, G, H·W, C / G)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(B, H, W, C))
        return mixed

    def add_by_bands(self, x: Tensor, norm: nn.LayerNorm) -> None:
        """x += self(norm(x)), in place."""
        positions, channels = x.shape[1] * x.shape[2], x.shape[3]
        for row in range(len(x)):
            image = x[row : row + 1]
            if positions < 2 * channels:  # the last stage: folding would cost more than it saves
                image += self(norm(image))
                continue
            scores = torch.stack([self._scores(norm(band), positions) for band in bands(image)]).sum(0)
            weight, bias = self._fold(scores.softmax(dim=-1))
            for band in bands(image):
                band += linear(norm(band), weight, bias)

    def _scores(self, x: Tensor, positions: int) -> Tensor:
        """What x (1, h, W, C), some of all `positions`, contributes to the scores: (G, C / G, C / G)."""
        _, h, W, C = x.shape
        bias = None if self.qkv.bias is None else self.qkv.bias[: 2 * C]
        query_key = linear(x, self.qkv.weight[: 2 * C], bias).view(h, W, 2, self.groups, C // self.groups)
        query, key = query_key.permute(2, 3, 0, 1, 4)  # each (G, h, W, C / G)
        # scaled first, so that float16 can hold the sums
        scores: Tensor = ((query * positions**-0.5).transpose(-2, -1) @ key).sum(dim=1)
        return scores

    def _fold(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Value, attention and output projection as one linear map: (C, C) and (C,).

        Once the weights (G, C / G, C / G) are known, every position goes through the same three products.
        """
        C = self.proj.weight.shape[0]
        by_group = self.proj.weight.view(C, self.groups, C // self.groups).transpose(0, 1) @ weights
        mixing = by_group.transpose(0, 1).reshape(C, C)
        bias = self.proj.bias if self.qkv.bias is None else torch.addmv(self.proj.bias, mixing, self.qkv.bias[2 * C :])
        return linear(mixing, self.qkv.weight[2 * C :].t()), bias


def _record_three(trace: Trace | None, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv
    return record(trace, "queries", query), record(trace, "keys", key), record(trace, "values", value)


_PARTS = frozenset(
    (SpatialBlock, ChannelBlock, DepthwiseConv, Mlp, WindowAttention, ChannelAttention, Linear, nn.LayerNorm)
)

# A band of 4,608 positions of the first stage makes 9 MB in the MLP: larger tensors leave the cache, and every fresh
# one of more than some 30 MB costs page faults. Base at 768 px: from 2.8 s to 1.6 s together with `linear`.
BAND_POSITIONS = 4608


def bands(x: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """Views (1, h, W, C) of x (B, H, W, C), some rows of one picture each; h a multiple of `multiple`, or the rest."""
    rows = max(1, BAND_POSITIONS // (x.shape[2] * multiple)) * multiple
    for image in x.unbind():
        for start in range(0, x.shape[1], rows):
            yield image[None, start : start + rows]


def split_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B·windows, window², C); H and W must be multiples of `window`."""
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.transpose(2, 3).reshape(-1, window * window, C)


def join_windows(windows: Tensor, window: int, H: int, W: int) -> Tensor:
    """The inverse of `split_windows`: (B·windows, window², C) -> (B, H, W, C)."""
    C = windows.shape[-1]
    x = windows.view(-1, H // window, W // window, window, window, C)
    return x.transpose(2, 3).reshape(-1, H, W, C)
