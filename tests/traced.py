"""Images, prompts and settings for traced runs; checkpoints with few words, for most parameters are there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from florence2 import Florence2, GenerationOptions, load
from florence2.checkpoints.checkpoint import save_checkpoint
from florence2.checkpoints.files import read_json, write_json
from florence2.inputs.tokenizer import FlorenceTokenizer
from parity.cases import shapes
from parity.recipe import make_checkpoint, make_model, make_picture
from recipes.nano.train import nano_config
from tests.conftest import copy_native, copy_processor
from tests.two_stages import two_stages


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint in Microsoft's layout with 300 tokens. Do not write to it."""
    folder, shape = tmp_path_factory.mktemp("plain"), shapes()[3]
    config = replace(shape.config, text=replace(shape.config.text, vocab_size=300))
    make_checkpoint(folder, config, shape.seed, shape.end_bonus, shape.size)
    return folder


@pytest.fixture(scope="session")
def converted_folder(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same in the native layout, except that it has no final_logits_bias; its embedding has 320 rows."""
    return copy_native(plain_folder, tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Florence2:
    """Three encoder and four decoder layers, images of 384 x 256 pixels; writes locations more often than words."""
    folder, shape = tmp_path_factory.mktemp("deep"), shapes()[2]
    make_checkpoint(folder, shape.config, shape.seed, shape.end_bonus, shape.size)
    f = load(folder)
    f.model.final_logits_bias[0, 50269:51269] += 9.0
    return f


@pytest.fixture(scope="session")
def mini_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with the specimen's tokenizer: 64 x 64 pixels, two layers, four heads. Do not write to it."""
    folder = tmp_path_factory.mktemp("mini")
    copy_processor(folder)
    settings = read_json(folder / "preprocessor_config.json")
    write_json(
        folder / "preprocessor_config.json", settings | {"size": {"height": 64, "width": 64}, "image_seq_length": 65}
    )
    full = nano_config(FlorenceTokenizer(folder / "tokenizer.json").vocab_size)
    vision = two_stages(full.vision)
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4}
    model = make_model(replace(full, vision=vision, text=replace(full.text, d_model=32, **layers, **heads)), 31, 6.0)
    save_checkpoint(model, folder, "microsoft", torch.float32)
    return folder


@pytest.fixture(scope="session")
def mini(mini_folder: Path) -> Florence2:
    """Return the same, loaded."""
    return load(mini_folder)


PROMPTS = [
    ("<OD>", None),
    ("<CAPTION>", None),
    ("<CAPTION_TO_PHRASE_GROUNDING>", "a green car beside a house with a red door"),
    ("<REGION_TO_DESCRIPTION>", (10.0, 20.0, 150.0, 120.0)),
]
"""Prompts of three lengths."""


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    return [make_picture(5, 320, 200), make_picture(6, 100, 200)]


@pytest.fixture
def beams(small: Florence2) -> GenerationOptions:
    """Three beams whose answers are cut or end between the fifth and the ninth id."""
    return small.options(num_beams=3, max_new_tokens=9, min_new_tokens=5)


@pytest.fixture
def greedy(small: Florence2) -> GenerationOptions:
    return small.options(num_beams=1, max_new_tokens=8, min_new_tokens=4, repetition_penalty=1.2)
