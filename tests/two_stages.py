"""The specimen's vision tower, smaller: for tests of everything that stands above it."""

from dataclasses import replace

from florence2.model.config import VisionConfig


def two_stages(vision: VisionConfig) -> VisionConfig:
    """Two stages of one block each, 16 and 32 channels: 64 x 64 pixels become 8 x 8 image tokens of 32 numbers."""
    return replace(
        vision,
        dim_embed=(16, 32),
        depths=(1, 1),
        num_heads=(2, 4),
        num_groups=(2, 4),
        patch_size=(7, 3),
        patch_stride=(4, 2),
        patch_padding=(3, 1),
        patch_prenorm=(False, True),
        window_size=4,
        projection_dim=32,
    )
