"""The cases of the comparisons: synthetic models, generation settings, prompts, images and texts."""

import random
from dataclasses import dataclass, replace
from typing import Any

from florence2.checkpoints.presets import preset
from florence2.model.config import Florence2Config, VisionConfig


@dataclass(frozen=True)
class SyntheticModel:
    """A small architecture with synthetic weights. Sizes that code could confuse differ from each other."""

    name: str
    config: Florence2Config
    size: tuple[int, int]  # (height, width) of pixel_values
    seed: int
    end_bonus: float
    """Added to the logit of the end token, so that about half of the answers end after ten to forty tokens."""
    references: tuple[str, ...] = ("native", "remote")
    """The references that implement it. The remote code refuses grids that are not square; the native model has one
    kind of pooling, and scales prompts wherever decoder tokens are scaled."""


def shapes() -> list[SyntheticModel]:
    """Return the models that every run compares."""
    tiny = preset("tiny")
    vision, text = tiny.vision, tiny.text
    return [
        SyntheticModel("tiny, 768 x 768", tiny, (768, 768), seed=21, end_bonus=13.0),
        # windows that do not divide the grid, and a grid that is not square
        SyntheticModel(
            "window 7, 320 x 448",
            replace(tiny, vision=replace(vision, window_size=7, depths=(2, 1, 1, 1))),
            (320, 448),
            seed=22,
            end_bonus=17.0,
            references=("native",),
        ),
        # three stages, other kernels, group counts that are not head counts, an encoder unlike the decoder
        SyntheticModel(
            "three stages, deep text",
            replace(
                tiny,
                vision=_three_stages(vision),
                text=replace(
                    text,
                    d_model=48,
                    encoder_layers=3,
                    encoder_attention_heads=6,
                    encoder_ffn_dim=80,
                    decoder_layers=4,
                    decoder_attention_heads=3,
                    decoder_ffn_dim=112,
                    max_position_embeddings=4096,
                ),
            ),
            (384, 256),
            seed=23,
            end_bonus=13.0,
            references=("native",),
        ),
        SyntheticModel(
            "two stages, one layer",
            replace(
                tiny,
                vision=replace(
                    _three_stages(vision, stages=2), window_size=5, projection_dim=64, max_position_embeddings=40
                ),
                text=replace(text, encoder_layers=1, decoder_layers=1, max_position_embeddings=700),
            ),
            (160, 224),
            seed=24,
            end_bonus=15.0,
            references=("native",),
        ),
        SyntheticModel(
            "window 9, 352 x 352, scaled, other pooling",
            replace(
                tiny,
                vision=replace(vision, window_size=9, image_feature_source=("last_frame", "spatial_avg_pool")),
                text=replace(text, scale_embedding=True, decoder_layers=3),
            ),
            (352, 352),
            seed=26,
            end_bonus=15.0,
            references=("remote",),
        ),
        SyntheticModel(
            "three stages, 256 x 256, pooled thrice",
            replace(
                tiny,
                vision=replace(
                    _three_stages(vision),
                    image_feature_source=("temporal_avg_pool", "last_frame", "spatial_avg_pool"),
                ),
                text=replace(text, d_model=48, encoder_attention_heads=6, decoder_attention_heads=3),
            ),
            (256, 256),
            seed=27,
            end_bonus=13.0,
            references=("remote",),
        ),
    ]


def _three_stages(vision: VisionConfig, stages: int = 3) -> VisionConfig:
    return replace(
        vision,
        dim_embed=(24, 48, 96)[:stages],
        depths=(1, 2, 1)[:stages],
        num_heads=(3, 6, 12)[:stages],
        num_groups=(2, 4, 8)[:stages],
        patch_size=(5, 3, 2)[:stages],
        patch_stride=(4, 2, 2)[:stages],
        patch_padding=(2, 1, 0)[:stages],
        patch_prenorm=(False, True, True)[:stages],
        window_size=6,
        projection_dim=48,
        max_position_embeddings=37,
    )


def base_shape() -> SyntheticModel:
    """Return the full base shape, which `--full` adds."""
    return SyntheticModel("base, 768 x 768", preset("base"), (768, 768), seed=25, end_bonus=9.0)


SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 3, "max_new_tokens": 48},
    {"num_beams": 1, "max_new_tokens": 48},
    {"num_beams": 5, "max_new_tokens": 40, "length_penalty": 2.0},
    {"num_beams": 4, "max_new_tokens": 40, "early_stopping": False, "length_penalty": 0.3},
    {"num_beams": 3, "max_new_tokens": 40, "early_stopping": False, "length_penalty": 1.0},
    {"num_beams": 2, "max_new_tokens": 40, "early_stopping": "never", "length_penalty": 1.5},
    {"num_beams": 3, "max_new_tokens": 30, "early_stopping": "never", "length_penalty": -0.5},
    {"num_beams": 3, "max_new_tokens": 32, "no_repeat_ngram_size": 0},
    {"num_beams": 3, "max_new_tokens": 30, "no_repeat_ngram_size": 1},
    {"num_beams": 3, "max_new_tokens": 30, "min_new_tokens": 20, "no_repeat_ngram_size": 2},
    {"num_beams": 1, "max_new_tokens": 30, "min_new_tokens": 12, "repetition_penalty": 1.2},
    {"num_beams": 3, "max_new_tokens": 24, "num_return_sequences": 3},
    {"num_beams": 3, "max_new_tokens": 30, "repetition_penalty": 1.3},
    {"num_beams": 3, "max_new_tokens": 30, "forced_bos_token_id": None, "forced_eos_token_id": None},
    {"num_beams": 3, "max_new_tokens": 5},
    {"num_beams": 3, "max_new_tokens": 1},
    {"num_beams": 1, "max_new_tokens": 1},
]
"""Generation settings, as changes to a checkpoint's own."""

IMAGES = [(31, 640, 480, "RGB"), (32, 333, 517, "RGB")]
"""Arguments of `make_picture`."""

PROMPTS = ["<CAPTION>", "<OPEN_VOCABULARY_DETECTION>a green car<and>a dog"]

PIXEL_IMAGES = [
    (41, 640, 480, "RGB"),
    (42, 97, 61, "L"),
    (43, 300, 500, "RGBA"),
    (44, 1200, 300, "P"),
    (45, 64, 64, "CMYK"),
    (46, 20, 2000, "LA"),
    (47, 1024, 768, "RGB"),
]

_WORDS = ["car", "a green car", " dog", "é", "naïve", "日本", "🙂", "\n", " ", "  "]
_WORDS += ["it", "the", "a group", ".", "x<y", "I'm", "42"]
_TAGS = ["<s>", "</s>", "<pad>", "<sep>", "<poly>", "</poly>", "<od>", "</od>", "<and>", "<obj>", "<", ">", "loc_5>"]


def random_text(rng: random.Random) -> str:
    """Make a text like a generated answer: words, tags and runs of location tokens, in any order."""
    parts = [rng.choice(["", "</s><s>", "<s>", "</s>"])]
    for _ in range(rng.randint(0, 9)):
        if rng.random() < 0.5:
            parts.append(rng.choice(_WORDS if rng.random() < 0.6 else _TAGS))
        else:
            parts += [f"<loc_{rng.randint(0, 999)}>" for _ in range(rng.choice([1, 2, 3, 4, 4, 4, 5, 6, 8, 8, 9, 12]))]
    return "".join([*parts, rng.choice(["", "</s>", "</s><pad>", "<loc_1000>"])])
