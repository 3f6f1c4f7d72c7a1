"""The vision tower: its parts against plain formulas; the whole is compared with the reference in test_records."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.checkpoints.presets import preset
from florence2.model.config import VisionConfig
from florence2.model.davit import (
    ChannelAttention,
    ChannelBlock,
    ConvEmbed,
    DaViT,
    DepthwiseConv,
    SpatialBlock,
    WindowAttention,
    join_windows,
    split_windows,
)
from parity.cases import shapes
from tests import plain


@pytest.fixture
def config() -> VisionConfig:
    return shapes()[2].config.vision


@pytest.mark.parametrize("size", [(6, 6), (12, 18), (18, 6)])
def test_windows_split_and_join(size: tuple[int, int]) -> None:
    x = torch.arange(2 * size[0] * size[1] * 3.0).view(2, *size, 3)
    windows = split_windows(x, 6)
    assert windows.shape == (2 * size[0] * size[1] // 36, 36, 3)
    assert torch.equal(join_windows(windows, 6, *size), x)
    assert torch.equal(windows[0].view(6, 6, 3), x[0, :6, :6])


def test_window_attention_pads_with_zeros_that_are_attended_to() -> None:
    """A 2 x 3 grid in windows of 4: each position attends to all 16 places, 10 of which are zero vectors."""
    torch.manual_seed(0)
    attention = WindowAttention(8, heads=2, window=4, qkv_bias=True).double()
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    padded = torch.zeros(1, 4, 4, 8, dtype=torch.float64)
    padded[:, :2, :3] = x
    query, key, value = attention.qkv(padded.view(1, 16, 8)).view(1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-1, -2) / 2.0).softmax(-1)
    expected = attention.proj((weights @ value).transpose(1, 2).reshape(1, 16, 8)).view(1, 4, 4, 8)[:, :2, :3]
    assert torch.allclose(attention(x), expected, atol=1e-12)


def test_channel_attention_by_loops() -> None:
    torch.manual_seed(1)
    attention = ChannelAttention(12, groups=3, qkv_bias=True).double()
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    q, k, v = attention.qkv(x).view(2, 15, 3, 12).unbind(2)
    expected = torch.zeros(2, 15, 12, dtype=torch.float64)
    for b in range(2):
        for g in range(3):
            part = slice(4 * g, 4 * g + 4)
            scores = torch.stack([(q[b, :, part][:, i : i + 1] * k[b, :, part]).sum(0) for i in range(4)]) / 15**0.5
            expected[b, :, part] = (scores.softmax(-1) @ v[b, :, part].T).T
    assert torch.allclose(attention(x), attention.proj(expected).view(2, 3, 5, 12), atol=1e-12)


def test_long_sums_keep_their_digits() -> None:
    """Scores over 36,864 positions in float32, against float64: a single running sum would lose a digit more."""
    torch.manual_seed(2)
    attention = ChannelAttention(16, groups=2, qkv_bias=True)
    x = torch.randn(1, 192, 192, 16) + 0.5
    error = (attention(x).double() - attention.double()(x.double())).abs().max()
    assert error < 2e-6


def test_depthwise_convolution_sees_rows_and_columns() -> None:
    conv = DepthwiseConv(1)
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()  # type: ignore[union-attr]
        conv.weight[0, 0, 0, 1] = 1.0  # the neighbour above
    x = torch.arange(6.0).view(1, 3, 2, 1)
    assert conv(x)[0, :, :, 0].tolist() == [[0.0, 0.0], [0.0, 1.0], [2.0, 3.0]]


@pytest.fixture
def little() -> VisionConfig:
    return replace(
        preset("tiny").vision,
        dim_embed=(12, 24),
        depths=(1, 2),
        num_heads=(3, 6),
        num_groups=(2, 4),
        window_size=4,
        mlp_ratio=2.5,
    )


def neighbours(x: Tensor, conv: DepthwiseConv) -> Tensor:
    """Each channel's own weighted sum of its 3 x 3 neighbours, zeros outside."""
    H, W = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    terms = [padded[:, i : i + H, j : j + W] * conv.weight[:, 0, i, j] for i in range(3) for j in range(3)]
    return torch.stack(terms).sum(0) + conv.bias


def by_windows(x: Tensor, attn: Any) -> Tensor:
    """3 heads, windows of 4 x 4, zeros at the right and at the bottom."""
    B, H, W, C = x.shape
    out = F.pad(x, (0, 0, 0, -W % 4, 0, -H % 4))
    for top in range(0, H, 4):
        for left in range(0, W, 4):
            window = out[:, top : top + 4, left : left + 4]
            query, key, value = plain.linear(window.reshape(B, 16, C), attn.qkv).chunk(3, dim=-1)
            window.copy_(plain.linear(plain.attention(query, key, value, heads=3), attn.proj).view(B, 4, 4, C))
    return out[:, :H, :W]


def by_groups(x: Tensor, attn: Any) -> Tensor:
    """2 groups; channels are the tokens, positions their features."""
    qkv = plain.linear(x.flatten(1, 2), attn.qkv).transpose(1, 2).chunk(3, dim=1)  # three of (B, C, N)
    groups = zip(*(part.chunk(2, dim=1) for part in qkv), strict=True)
    mixed = torch.cat([plain.attention(*group, heads=1) for group in groups], dim=1)
    return plain.linear(mixed.transpose(1, 2), attn.proj).view_as(x)


@pytest.mark.parametrize(
    ("kind", "name", "attended"),
    [(SpatialBlock, "window_attn", by_windows), (ChannelBlock, "channel_attn", by_groups)],
)
def test_block_from_its_weights(
    little: VisionConfig, kind: Any, name: str, attended: Callable[[Tensor, Any], Tensor]
) -> None:
    """x += conv(x); x += attention(LN(x)); x += conv(x); x += MLP(LN(x))"""
    torch.manual_seed(4)
    block = plain.randomised(kind(little, 0, 0.0, "sdpa"))
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    found = block(x)
    with torch.no_grad():
        x = x + neighbours(x, block.conv1)
        x = x + attended(plain.norm(x, block.norm1), getattr(block, name))
        x = x + neighbours(x, block.conv2)
        assert plain.equal(found, x + plain.mlp(plain.norm(x, block.norm2), block.ffn))


@pytest.mark.parametrize("before", [True, False])
def test_strided_convolution_with_its_norm_before_or_after(little: VisionConfig, before: bool) -> None:
    """Where the norm comes first, the border is still of zeros, not of what the norm makes of zeros."""
    torch.manual_seed(5)
    embed = plain.randomised(ConvEmbed(replace(little, patch_prenorm=(False, before)), 1))
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    y = F.pad(plain.norm(x, embed.norm) if before else x, (0, 0, 1, 1, 1, 1))
    patches = y.unfold(1, 3, 2).unfold(2, 3, 2)  # 3 x 3, every second: (B, h, w, C, 3, 3)
    y = torch.einsum("bhwcij,dcij->bhwd", patches, embed.conv.weight) + embed.conv.bias
    assert plain.equal(embed(x), y if before else plain.norm(y, embed.norm))


def test_a_stage_is_its_convolution_then_pairs_of_a_spatial_and_a_channel_block(little: VisionConfig) -> None:
    torch.manual_seed(6)
    tower = plain.randomised(DaViT(little))
    pixels = torch.randn(1, 3, 24, 40, dtype=torch.float64)
    x = pixels.permute(0, 2, 3, 1)
    blocks: Any = tower.blocks
    for part in (tower.convs[0], blocks[0][0].spatial_block, blocks[0][0].channel_block):
        x = part(x)
    x = tower.convs[1](x)
    for pair in blocks[1]:
        x = pair.channel_block(pair.spatial_block(x))
    assert x.shape == (1, 3, 5, 24) and plain.equal(tower(pixels), x)


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (4, 6)), ((70, 66), (4, 4)), ((32, 32), (2, 2))])
def test_shapes(config: VisionConfig, size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert DaViT(config)(torch.randn(2, 3, *size)).shape == (2, *grid, 96)


def test_eager_is_the_same(config: VisionConfig) -> None:
    fused, eager = DaViT(config).eval(), DaViT(config, attention="eager").eval()
    eager.load_state_dict(fused.state_dict())
    x = torch.randn(1, 3, 96, 64)
    assert torch.allclose(fused(x), eager(x), atol=1e-4)


def test_pictures_of_a_batch_do_not_see_each_other(config: VisionConfig) -> None:
    tower = DaViT(config).double().eval()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    assert torch.allclose(tower(x)[1], tower(x[1:2])[0], atol=1e-12)


def test_config_decides_everything(config: VisionConfig) -> None:
    wide = DaViT(replace(config, mlp_ratio=2.5, qkv_bias=False, patch_prenorm=(True, False, True)))
    block: Any = wide.blocks[1][1]  # type: ignore[index]
    assert block.spatial_block.ffn.fc1.weight.shape == (120, 48)
    assert block.spatial_block.window_attn.qkv.bias is None and block.channel_block.channel_attn.qkv.bias is None
    norms = [conv.norm.weight.shape[0] for conv in wide.convs]  # type: ignore[union-attr]
    assert norms == [3, 48, 48]
    assert wide(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_stochastic_depth_is_off_outside_training_and_right_on_average(config: VisionConfig) -> None:
    tower = DaViT(replace(config, drop_path_rate=0.5))
    stages: Any = tower.blocks
    rates = [b.drop_path_rate for stage in stages for pair in stage for b in (pair.spatial_block, pair.channel_block)]
    assert rates == pytest.approx([0.5 * i / 7 for i in range(8)])
    block: Any = tower.blocks[2][0].channel_block  # type: ignore[index]
    branch = torch.ones(4000, 1, 1, 1)
    assert torch.equal(block.eval()._drop_path(branch), branch)
    dropped = block.train()._drop_path(branch)
    assert set(dropped.flatten().tolist()) == {0.0, 2.0} and abs(float(dropped.mean()) - 1.0) < 0.1


def test_layer_norm_epsilon_and_exact_gelu(config: VisionConfig) -> None:
    tower = DaViT(config)
    assert {module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}
    mlp: Any = tower.blocks[0][0].spatial_block.ffn  # type: ignore[index]
    x = torch.linspace(-4, 4, 24).view(1, 24)
    exact = mlp.fc2(mlp.fc1(x) * 0.5 * (1 + torch.erf(mlp.fc1(x) / 2**0.5)))
    assert torch.allclose(mlp(x), exact, atol=1e-6)
    approximate: Tensor = mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh"))
    assert not torch.allclose(approximate, exact, atol=1e-6)
