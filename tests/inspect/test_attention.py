"""Maps of cross-attention: every weight is in one of them, and on the pixels that its cell covers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from florence2 import Florence2, load
from florence2.errors import OptionError
from florence2.inspect import attention_maps
from florence2.inspect.attention import spread_over
from parity.cases import shapes
from parity.recipe import make_checkpoint

WEIGHTS = "decoder.layers.*.cross_attention.weights"


@pytest.fixture(scope="module")
def traced(deep: Florence2, images: list[Image.Image]) -> Any:
    options = deep.options(max_new_tokens=7, min_new_tokens=5, num_return_sequences=2)
    with deep.trace(WEIGHTS) as t:
        deep.run("<OD>", images[0], options=options)
    return t


@pytest.mark.parametrize("alternative", [0, 1])
def test_every_weight_is_in_one_map(deep: Florence2, traced: Any, alternative: int) -> None:
    maps = attention_maps(traced.run, alternative)
    T, P = len(traced.run.answer_ids(alternative)), len(traced.run.prompt_ids)
    assert maps.places.shape == (T, 4, 3, 24, 16) and maps.image_size == (320, 200)
    assert maps.pooled.shape == (T, 4, 3, 1) and maps.prompt.shape == (T, 4, 3, P)
    total = maps.image_share + maps.pooled.sum(-1) + maps.prompt.sum(-1)
    assert torch.allclose(total, torch.ones(T, 4, 3), atol=1e-5)
    for layer in range(4):
        weights = traced.along_answer(f"decoder.layers.{layer}.cross_attention.weights", alternative)
        assert torch.equal(maps.pooled[:, layer], weights[..., :1])
        assert torch.equal(maps.places[:, layer, :, 2, 5], weights[..., 1 + 2 * 16 + 5])
        assert torch.equal(maps.prompt[:, layer, :, 3], weights[..., 1 + 24 * 16 + 3])


def test_tokens_of_one_place_are_added(tmp_path: Path, images: list[Image.Image]) -> None:
    """Pooled as the places over time, the last image's places, and the mean."""
    shape = shapes()[5]
    make_checkpoint(tmp_path, shape.config, shape.seed, shape.end_bonus, shape.size)
    f = load(tmp_path)
    with f.trace(WEIGHTS) as t:
        f.run("<OD>", images[0], options=f.options(max_new_tokens=3))
    maps, weights = attention_maps(t.run), t.along_answer("decoder.layers.1.cross_attention.weights")
    n = 16 * 16
    assert torch.allclose(maps.places[:, 1].flatten(-2), weights[..., :n] + weights[..., n : 2 * n])
    assert torch.equal(maps.pooled[:, 1], weights[..., 2 * n : 2 * n + 1])


def test_pixels_have_the_weights_of_their_cells() -> None:
    cells = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    flat = spread_over(cells, (9, 4), smooth=False)
    assert torch.equal(flat, cells.repeat_interleave(2, 0).repeat_interleave(3, 1))
    smooth = spread_over(cells[None], (9, 5))[0]
    assert smooth.shape == (5, 9)
    assert torch.allclose(smooth[0, 1::3], cells[0]) and torch.allclose(smooth[4, 1::3], cells[1])
    assert torch.allclose(smooth[2], (smooth[0] + smooth[4]) / 2)
    assert torch.allclose(smooth[0, :5], torch.tensor([1, 1, 4 / 3, 5 / 3, 2]))


def test_on_the_image(traced: Any) -> None:
    pixels = attention_maps(traced.run).to_pixels(smooth=False)
    assert pixels.shape[:3] == (len(traced.run.answer_ids()), 4, 3) and pixels.shape[3:] == (200, 320)
    assert torch.equal(pixels[..., 0, 0], attention_maps(traced.run).places[..., 0, 0])
    assert torch.equal(pixels[..., -1, -1], attention_maps(traced.run).places[..., -1, -1])


def test_what_was_not_kept(deep: Florence2, images: list[Image.Image]) -> None:
    with deep.trace("memory") as t:
        deep.run("<OD>", images[0], options=deep.options(max_new_tokens=2))
    with pytest.raises(OptionError, match="'decoder.layers.0.cross_attention.weights' was not kept; name it"):
        attention_maps(t.run)
