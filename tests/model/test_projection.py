"""Positions, pooling, projection."""

from dataclasses import replace

import pytest
import torch

from florence2.checkpoints.presets import preset
from florence2.errors import ImageError
from florence2.model.config import VisionConfig
from florence2.model.projection import CosineTable, PositionTable, Projection
from parity.cases import shapes
from parity.recipe import make_weight
from tests import plain


@pytest.fixture
def config() -> VisionConfig:
    return replace(shapes()[2].config.vision, image_feature_source=("spatial_avg_pool", "temporal_avg_pool"))


def test_column_comes_first_then_row() -> None:
    table = PositionTable(6, 9)
    grid = table(4, 7)
    assert grid.shape == (4, 7, 6)
    assert torch.equal(grid[2, 5], torch.cat([table.column_embeddings.weight[5], table.row_embeddings.weight[2]]))


def test_a_grid_beyond_the_table_gets_a_sentence() -> None:
    table = PositionTable(6, 9)
    assert table(9, 9).shape == (9, 9, 6) and table(1, 1).shape == (1, 1, 6)
    for grid in ((0, 1), (1, 0), (10, 9), (9, 10)):
        with pytest.raises(ImageError, match="knows 1 x 1 to 9 x 9"):
            table.check(*grid)
    with pytest.raises(ImageError, match=r"grid of 10 x 3 positions, but this checkpoint knows 1 x 1 to 9 x 9"):
        table(10, 3)


def test_cosine_table() -> None:
    """Even channels are sines, odd ones cosines, of frame / 10000^(i / C)."""
    table = CosineTable(5, 8).pos_idx_to_embed
    assert table[0].tolist() == [0.0, 1.0] * 4
    assert table[3, 2].item() == pytest.approx(torch.sin(torch.tensor(3 / 10000 ** (2 / 8))).item(), abs=1e-6)
    assert table[3, 5].item() == pytest.approx(torch.cos(torch.tensor(3 / 10000 ** (4 / 8))).item(), abs=1e-6)
    assert torch.equal(
        CosineTable(100, 1024).pos_idx_to_embed,
        torch.from_numpy(make_weight("visual_temporal_embed.pos_idx_to_embed", (100, 1024), 0, 0)),
    )


def test_projection_position_by_position() -> None:
    """The published pooling: the mean of all positions, then each; frame 0 adds 0, 1, 0, 1, ..."""
    config = replace(
        preset("tiny").vision, dim_embed=(6,), max_position_embeddings=5, max_temporal_embeddings=3, projection_dim=8
    )
    torch.manual_seed(0)
    projection = plain.randomised(Projection(config))
    rows, columns = (
        table.weight
        for table in (projection.image_position_embed.row_embeddings, projection.image_position_embed.column_embeddings)
    )
    grid, frame = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.tensor([0.0, 1.0] * 3)
    placed = [grid[:, y, x] + torch.cat([columns[x], rows[y]]) + frame for y in range(3) for x in range(4)]
    tokens = torch.stack([sum(placed, torch.zeros(())) / 12, *placed], dim=1)
    expected = plain.norm(tokens @ projection.image_projection.weight.T, projection.image_proj_norm)
    assert plain.equal(projection(grid), expected)


@pytest.mark.parametrize(
    ("sources", "tokens"),
    [
        (("spatial_avg_pool", "temporal_avg_pool"), 13),
        (("temporal_avg_pool", "spatial_avg_pool"), 13),
        (("last_frame",), 12),
        (("spatial_avg_pool",), 1),
        (("last_frame", "temporal_avg_pool", "spatial_avg_pool"), 25),
    ],
)
def test_sources_in_the_order_named(config: VisionConfig, sources: tuple[str, ...], tokens: int) -> None:
    projection = Projection(replace(config, image_feature_source=sources)).double()
    grid = torch.randn(2, 3, 4, 96, dtype=torch.float64)
    placed = (grid + projection.image_position_embed(3, 4)).flatten(
        1, 2
    ) + projection.visual_temporal_embed.pos_idx_to_embed[0]
    parts = {"spatial_avg_pool": placed.mean(1, keepdim=True), "temporal_avg_pool": placed, "last_frame": placed}
    expected = torch.cat([parts[source] for source in sources], dim=1) @ projection.image_projection.weight.T
    found = projection(grid)
    assert found.shape == (2, tokens, 48)
    assert torch.allclose(found, projection.image_proj_norm(expected), atol=1e-12)
