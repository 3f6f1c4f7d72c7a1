"""The shapes of the published checkpoints, and untrained checkpoints of these shapes, for tests and benchmarks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from florence2.checkpoints.checkpoint import copy_companions, refuse_existing, save_checkpoint, save_tokenizer
from florence2.checkpoints.checks.belonging import check_image_size
from florence2.checkpoints.config_files import parse_image_config
from florence2.checkpoints.files import new_files, read_json, write_json
from florence2.errors import CheckpointError, ConfigError, OptionError, shown
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.inputs.tokenizer_file import BEGIN, END, PADDING
from florence2.model.config import FEATURE_SOURCES, Florence2Config, TextConfig, VisionConfig
from florence2.model.florence2 import Florence2Model

PUBLISHED_PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"height": 768, "width": 768},
    "resample": 3,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_center_crop": False,
    "image_seq_length": 577,
}
"""`preprocessor_config.json` of every published checkpoint."""


def preset(name: str) -> Florence2Config:
    """Return the configuration of "base", "large" (the revision with 4,096 positions) or "tiny".

    "tiny" has 4.3 M parameters and is for tests. Raises ConfigError for any other name.
    """
    shapes = {
        "tiny": (16, (1, 1, 2, 1), 2, 64, 2, 4, 128, 1024),
        "base": (128, (1, 1, 9, 1), 4, 768, 6, 12, 3072, 1024),
        "large": (256, (1, 1, 9, 1), 8, 1024, 12, 16, 4096, 4096),
    }
    if name not in shapes:
        raise ConfigError(f"Unknown preset {name!r}; choose one of {', '.join(shapes)}.")
    width, depths, heads, d_model, layers, text_heads, ffn, positions = shapes[name]
    doubling = (1, 2, 4, 8)
    vision = VisionConfig(
        dim_embed=tuple(width * k for k in doubling),
        depths=depths,
        num_heads=tuple(heads * k for k in doubling),
        num_groups=tuple(heads * k for k in doubling),
        patch_size=(7, 3, 3, 3),
        patch_stride=(4, 2, 2, 2),
        patch_padding=(3, 1, 1, 1),
        patch_prenorm=(False, True, True, True),
        window_size=12,
        projection_dim=d_model,
        max_position_embeddings=50,
        max_temporal_embeddings=100,
        image_feature_source=FEATURE_SOURCES[:2],
        drop_path_rate=0.1,
    )
    text = TextConfig(
        vocab_size=51289,
        d_model=d_model,
        encoder_layers=layers,
        encoder_attention_heads=text_heads,
        encoder_ffn_dim=ffn,
        decoder_layers=layers,
        decoder_attention_heads=text_heads,
        decoder_ffn_dim=ffn,
        max_position_embeddings=positions,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
    )
    generation = {
        "num_beams": 3,
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
    }
    return Florence2Config(vision, text, generation)


def init_checkpoint(
    folder: Path, config: Florence2Config, tokenizer: Path, seed: int = 0, dtype: torch.dtype = torch.float16
) -> None:
    """Write an untrained checkpoint in Microsoft's layout.

    Weights are normal with a standard deviation of 0.02; norms are identities. The vocabulary and the ids of special
    tokens are the tokenizer's.

    Args:
        folder: Where to write; it must not hold a checkpoint.
        config: The sizes of the model, such as `preset("base")`.
        tokenizer: A folder whose tokenizer and image settings are copied.
        seed: Equal seeds give equal weights.
        dtype: The type of the stored weights.

    Raises:
        CheckpointError: `folder` already holds a checkpoint, or `tokenizer` holds no tokenizer.json, a damaged one, or
            image settings that do not fit the model; nothing is written.
        OptionError: `seed` is out of range.
    """
    if not 0 <= seed < 1 << 63:
        raise OptionError(f"seed is {shown(seed)}; it must be a whole number from 0 to 2**63 - 1.")
    refuse_existing(folder)
    if not (tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{tokenizer} holds no tokenizer.json; give a folder or Hub name of a Florence-2 checkpoint."
        )
    words = FlorenceTokenizer(tokenizer / "tokenizer.json").without_image_token()
    config = _with_vocabulary(config, words)
    path = tokenizer / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else PUBLISHED_PREPROCESSOR
    images = parse_image_config(settings)
    check_image_size(config, images)
    model = Florence2Model(config)
    _draw_weights(model, seed)
    tokens = config.vision.image_tokens(images.height, images.width)
    with new_files(folder):
        save_checkpoint(model, folder, "microsoft", dtype)
        copy_companions(tokenizer, folder)
        save_tokenizer(words, folder, "microsoft", config)
        write_json(folder / "preprocessor_config.json", {**settings, "image_seq_length": tokens})


def _with_vocabulary(config: Florence2Config, tokenizer: FlorenceTokenizer) -> Florence2Config:
    """Return the configuration with the tokenizer's number of tokens and ids of special ones."""
    begin, padding, end = (tokenizer.token_id(token) or 0 for token in (BEGIN, PADDING, END))
    ids: dict[str, Any] = {
        "bos_token_id": begin,
        "pad_token_id": padding,
        "eos_token_id": end,
        "decoder_start_token_id": end,
    }
    generation = {**config.generation, "forced_bos_token_id": begin, "forced_eos_token_id": end}
    text = replace(config.text, vocab_size=tokenizer.vocab_size, **ids)
    return replace(config, text=text, generation=generation)


def _draw_weights(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif isinstance(module, nn.LayerNorm):
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.02, generator=generator)
