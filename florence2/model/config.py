"""The shape of a model as frozen dataclasses, and the check that a shape can be built.

One `Florence2Config` serves both layouts in which checkpoints are published; `checkpoints.config_files` reads and
writes their `config.json`. Only what the reference itself takes for granted has a default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from florence2.errors import shown

Layout = Literal["microsoft", "native"]
FEATURE_SOURCES = ("spatial_avg_pool", "temporal_avg_pool", "last_frame")
MAX_LAYERS = 512  # per stack; published models have 12. Keeps a hostile file from building millions of modules.
MAX_SIZE = 1 << 20  # of any one dimension; the largest published is the vocabulary of 51,328
# Lower limits for padding, which costs memory at once, and for the one table that is computed rather than read.
_MOST = {"window_size": 256, "patch_size": 256, "patch_stride": 256, "patch_padding": 256}
_MOST |= {"dim_embed": 1 << 14, "max_temporal_embeddings": 1 << 12}
_LEAST = {"patch_padding": 0}


@dataclass(frozen=True)
class VisionConfig:
    """DaViT and the projection after it. Tuples hold one entry per stage; sizes are in channels or pixels."""

    dim_embed: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    num_groups: tuple[int, ...]
    patch_size: tuple[int, ...]
    patch_stride: tuple[int, ...]
    patch_padding: tuple[int, ...]
    patch_prenorm: tuple[bool, ...]
    window_size: int
    projection_dim: int
    max_position_embeddings: int
    """Rows, and also columns, of the learned position table: the largest grid in either direction."""
    max_temporal_embeddings: int
    image_feature_source: tuple[str, ...]
    drop_path_rate: float = 0.0
    mlp_ratio: float = 4.0
    qkv_bias: bool = True

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (rows, columns) of positions that the last stage makes of `height` x `width` pixels."""
        for size, stride, padding in zip(self.patch_size, self.patch_stride, self.patch_padding, strict=True):
            height, width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
        return height, width

    def image_tokens(self, height: int, width: int) -> int:
        """Return the number of image tokens of `height` x `width` pixels."""
        rows, columns = self.grid_size(height, width)
        # the mean over the grid is one token; the other ways of pooling keep one for each position
        return sum(1 if source == "spatial_avg_pool" else rows * columns for source in self.image_feature_source)


@dataclass(frozen=True)
class TextConfig:
    """BART's encoder and decoder, and the ids of its special tokens."""

    vocab_size: int
    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_layers: int
    decoder_attention_heads: int
    decoder_ffn_dim: int
    max_position_embeddings: int
    scale_embedding: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    decoder_start_token_id: int = 2


@dataclass(frozen=True)
class Florence2Config:
    """Everything that `config.json` (and, in the native layout, `generation_config.json`) says.

    `generation` holds only the settings that the files state, by the names of `GenerationOptions`.
    """

    vision: VisionConfig
    text: TextConfig
    generation: Mapping[str, Any]
    layout: Layout = "microsoft"
    image_token_id: int | None = None
    """The native layout's id of its `<image>` placeholder, above the ids of the tokenizer; unused here."""


STAGE_TUPLES = ("dim_embed", "depths", "num_heads", "num_groups", "patch_size", "patch_stride", "patch_padding")
"""The fields of `VisionConfig` that hold one whole number per stage."""


def find_problems(vision: VisionConfig, text: TextConfig) -> list[str]:
    """Return a sentence for each reason why no model of this shape can be built; none when one can."""
    return _check_vision(vision) + _check_text(text, vision)


def _check_vision(vision: VisionConfig) -> list[str]:
    """Return the problems of single values or, where there are none, of how the values fit together."""
    stages = len(vision.dim_embed)
    problems = [
        f"vision_config.{key} has {len(getattr(vision, key))} entries for {stages} stages"
        for key in (*STAGE_TUPLES, "patch_prenorm")
        if len(getattr(vision, key)) != stages or not stages
    ]
    for key in STAGE_TUPLES:
        problems += _out_of_range("vision_config", key, *getattr(vision, key))
    for key in ("window_size", "projection_dim", "max_position_embeddings", "max_temporal_embeddings"):
        problems += _out_of_range("vision_config", key, getattr(vision, key))
    if problems:
        return problems
    for key in ("num_heads", "num_groups"):
        parts = getattr(vision, key)
        if any(dim % part for dim, part in zip(vision.dim_embed, parts, strict=True)):
            problems.append(f"vision_config.dim_embed {list(vision.dim_embed)} is not divisible by {key} {list(parts)}")
    if sum(vision.depths) > MAX_LAYERS:
        problems.append(f"vision_config.depths ask for {sum(vision.depths)} blocks; the limit is {MAX_LAYERS}")
    if vision.dim_embed[-1] % 2:
        problems.append(f"vision_config.dim_embed ends in {vision.dim_embed[-1]}; that must be even: half for columns")
    if not 0 < vision.mlp_ratio <= MAX_LAYERS:
        problems.append(f"vision_config.mlp_ratio is {vision.mlp_ratio}; it must be above 0 and at most {MAX_LAYERS}")
    if not 0 <= vision.drop_path_rate < 1:
        problems.append(f"vision_config.drop_path_rate is {vision.drop_path_rate}; it must be 0 or more and below 1")
    unknown = [source for source in vision.image_feature_source if source not in FEATURE_SOURCES]
    if unknown or not vision.image_feature_source:
        problems.append(
            f"vision_config.image_feature_source is {list(vision.image_feature_source)}; "
            f"it must name some of {', '.join(FEATURE_SOURCES)}"
        )
    return problems


def _check_text(text: TextConfig, vision: VisionConfig) -> list[str]:
    problems = []
    for key in ("vocab_size", "d_model", "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings"):
        problems += _out_of_range("text_config", key, getattr(text, key))
    for side in ("encoder", "decoder"):
        heads, layers = getattr(text, f"{side}_attention_heads"), getattr(text, f"{side}_layers")
        if heads < 1 or text.d_model % heads:
            problems.append(f"text_config.d_model {text.d_model} is not divisible by {heads} {side}_attention_heads")
        if not 1 <= layers <= MAX_LAYERS:
            problems.append(f"text_config.{side}_layers is {layers}; it must be 1 to {MAX_LAYERS}")
    if vision.projection_dim != text.d_model:
        problems.append(
            f"vision_config.projection_dim {vision.projection_dim} is not text_config.d_model {text.d_model}"
        )
    for key in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if getattr(text, key) >= text.vocab_size:
            problems.append(f"text_config.{key} {getattr(text, key)} is outside the vocabulary of {text.vocab_size}")
    return problems


def _out_of_range(section: str, key: str, *sizes: int) -> list[str]:
    least, most = _LEAST.get(key, 1), _MOST.get(key, MAX_SIZE)
    wrong = [size for size in sizes if not least <= size <= most]
    return [f"{section}.{key} is {shown(size)}; it must be {least} to {most}" for size in wrong]
