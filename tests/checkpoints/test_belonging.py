"""Which tokenizer and which image settings belong to a model."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from florence2.checkpoints.checks.belonging import check_image_settings, check_vocabulary
from florence2.checkpoints.presets import preset
from florence2.errors import CheckpointError
from florence2.inputs.image import ImageConfig
from florence2.model.config import Florence2Config

IDS = {"<s>": 0, "<pad>": 1, "</s>": 2}


def check(tokens: int, rows: int, image: int | None = None, **ids: int) -> None:
    text = replace(preset("base").text, vocab_size=rows, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    config = replace(preset("base"), text=replace(text, **ids), image_token_id=image)
    tokenizer: Any = SimpleNamespace(vocab_size=tokens, token_id=IDS.__getitem__)
    check_vocabulary(config, tokenizer)


@pytest.mark.parametrize(
    ("tokens", "rows", "image"),
    [(70, 70, None), (70, 128, None), (64, 64, None), (70, 71, 70), (70, 128, 70), (70, 70, 70), (70, 90, 60)],
)
def test_a_row_for_each_token(tokens: int, rows: int, image: int | None) -> None:
    check(tokens, rows, image)


@pytest.mark.parametrize(
    ("tokens", "rows", "image", "words"),
    [
        (70, 71, None, "has 70 tokens, but the model 71 embeddings; they belong to different checkpoints"),
        (70, 69, None, "has 70 tokens, but the model 69 embeddings;"),
        (70, 192, None, "has 70 tokens, but the model 192 embeddings;"),
        (129, 128, None, "has 129 tokens, but the model 128 embeddings;"),
        (70, 128, 71, "128 embeddings, the first 71 of them for tokens; they belong"),
        (70, 69, 60, "69 embeddings, the first 60 of them for tokens;"),
    ],
)
def test_other_numbers_are_of_another_checkpoint(tokens: int, rows: int, image: int | None, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        check(tokens, rows, image)


@pytest.mark.parametrize(("key", "token"), [("bos", "<s>"), ("pad", "<pad>"), ("eos", "</s>")])
def test_special_ids_are_those_of_the_tokenizer(key: str, token: str) -> None:
    with pytest.raises(CheckpointError, match=rf"a {key}_token_id of 9, but the tokenizer gives {token} the id"):
        check(70, 70, **{f"{key}_token_id": 9})


def images(height: int, width: int, tokens: int | None = None) -> ImageConfig:
    return ImageConfig(height, width, (0.5,) * 3, (0.5,) * 3, 1 / 255, 3, tokens)


def config(most: int = 50, positions: int = 1024) -> Florence2Config:
    base = preset("base")
    return replace(
        base,
        vision=replace(base.vision, max_position_embeddings=most),
        text=replace(base.text, max_position_embeddings=positions),
    )


def test_images_have_positions_in_the_grid_and_in_the_text() -> None:
    """768 x 768 pixels are a grid of 24 x 24, and 577 tokens."""
    check_image_settings(config(24, 578), images(768, 768, 577))
    check_image_settings(config(24, 578), images(768, 768))
    for height, width in ((768, 800), (800, 768), (0, 768), (768, 0)):
        with pytest.raises(CheckpointError, match=r"the model knows 1 x 1 to 24 x 24; choose another size"):
            check_image_settings(config(24), images(height, width))
    with pytest.raises(CheckpointError, match="become 577 tokens, which leave no room for a prompt in the 577"):
        check_image_settings(config(24, 577), images(768, 768))
    with pytest.raises(CheckpointError, match="an image_seq_length of 576, but images of 768 x 768 .* become 577"):
        check_image_settings(config(), images(768, 768, 576))
