"""The bridge from vision to language: positions, pooling, projection. (B, h, w, C) -> (B, N, D)."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from florence2.model.config import VisionConfig, check_grid
from florence2.model.trace import NO_TRACE, Trace


class Projection(nn.Module):
    """Grid -> image tokens.

    Each position gets a learned embedding of its column and row, and the embedding of frame 0 from a fixed cosine
    table (the published models see single images, not videos). The ways of pooling that `image_feature_source` names
    are concatenated, projected and normalised: as published, the mean over the grid, then its h·w positions, which
    makes 577 tokens of 768 x 768 pixels.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        channels = config.dim_embed[-1]
        self.sources = config.image_feature_source
        self.image_position_embed = PositionTable(channels, config.max_position_embeddings)
        self.visual_temporal_embed = CosineTable(config.max_temporal_embeddings, channels)
        self.image_projection = nn.Linear(channels, config.projection_dim, bias=False)
        self.image_proj_norm = nn.LayerNorm(config.projection_dim)

    def forward(self, grid: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        B, h, w, C = grid.shape
        positions = (grid + self.image_position_embed(h, w)).view(B, h * w, C)
        frames = (positions + self.visual_temporal_embed.pos_idx_to_embed[0])[:, None]  # (B, 1, h·w, C)
        pooled = {
            "spatial_avg_pool": frames.mean(dim=2),  # (B, 1, C)
            "temporal_avg_pool": frames.mean(dim=1),  # (B, h·w, C)
            "last_frame": frames[:, -1],  # (B, h·w, C)
        }
        tokens = trace("pooled", torch.cat([pooled[source] for source in self.sources], dim=1))  # (B, N, C)
        out: Tensor = self.image_proj_norm(self.image_projection(tokens))
        return out


class PositionTable(nn.Module):
    """A learned embedding of (column, row): column first, half of the channels each."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.row_embeddings = nn.Embedding(size, channels // 2)
        self.column_embeddings = nn.Embedding(size, channels // 2)

    def forward(self, h: int, w: int) -> Tensor:
        """Return (h, w, C). Raises ImageError as `check`."""
        self.check(h, w)
        rows, columns = self.row_embeddings.weight, self.column_embeddings.weight
        return torch.cat([columns[:w].expand(h, -1, -1), rows[:h, None].expand(-1, w, -1)], dim=-1)

    def check(self, h: int, w: int) -> None:
        """Raise ImageError for a grid that is empty or larger than the table."""
        check_grid(h, w, self.row_embeddings.num_embeddings)


class CosineTable(nn.Module):
    """A fixed table of sinusoids, one row per frame, stored in checkpoints as a buffer."""

    pos_idx_to_embed: Tensor

    def __init__(self, length: int, channels: int):
        super().__init__()
        # computed with NumPy: on the meta device torch would import its compiler for these operations
        step = np.exp(-math.log(10000.0) * np.arange(0, channels, 2, dtype=np.float32) / channels)
        angles = np.arange(length, dtype=np.float32)[:, None] * step
        table = np.stack([np.sin(angles), np.cos(angles)], axis=-1)  # sin, cos, sin, cos, ...
        self.register_buffer("pos_idx_to_embed", torch.from_numpy(table.reshape(length, channels)))
