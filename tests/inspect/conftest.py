"""Two pictures, the settings of short answers, and the batch that is harder than a single request."""

import pytest
from PIL import Image

from florence2 import Florence2, GenerationOptions
from parity.recipe import make_picture

PROMPTS = [
    ("<OD>", None),
    ("<CAPTION>", None),
    ("<CAPTION_TO_PHRASE_GROUNDING>", "a green car beside a house with a red door"),
    ("<REGION_TO_DESCRIPTION>", (10.0, 20.0, 150.0, 120.0)),
]
"""Prompts of three lengths."""


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    return [make_picture(5, 320, 200), make_picture(6, 100, 200)]


@pytest.fixture
def beams(small: Florence2) -> GenerationOptions:
    """Three beams whose answers are cut or end between the fifth and the ninth id."""
    return small.options(num_beams=3, max_new_tokens=9, min_new_tokens=5)


@pytest.fixture
def greedy(small: Florence2) -> GenerationOptions:
    return small.options(num_beams=1, max_new_tokens=8, min_new_tokens=4, repetition_penalty=1.2)
