"""Rollout against its product written out, position by position."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from florence2 import Florence2
from florence2.inspect.rollout import attention_rollout, decoder_rollout, encoder_rollout


@pytest.fixture(scope="module")
def traced(deep: Florence2, images: list[Image.Image]) -> Any:
    with deep.trace("encoder.layers.*.self_attention.weights", "decoder.layers.*.cross_attention.weights") as t:
        deep.run("<OD>", images[0], options=deep.options(max_new_tokens=6, min_new_tokens=5))
    return t


def test_the_encoders_is_the_product_of_its_layers(traced: Any) -> None:
    one, two, three = (traced[f"encoder.layers.{i}.self_attention.weights"].double() for i in range(3))
    S = one.shape[-1]

    def layer(weights: Tensor) -> Tensor:
        return 0.5 * sum(weights) / len(weights) + 0.5 * torch.eye(S).double()

    found = encoder_rollout(traced.run)
    assert torch.allclose(found.double(), layer(three) @ layer(two) @ layer(one), atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(S), atol=1e-5)
    assert len({float(layer(w)[0, 1]) for w in (one, two, three)}) == 3


def test_the_decoders_weighs_later_layers_more(traced: Any) -> None:
    """Half of the last, a quarter of the one before, an eighth, a sixteenth: of fifteen sixteenths."""
    weights = [traced.along_answer(f"decoder.layers.{i}.cross_attention.weights").mean(1) for i in range(4)]
    expected = (8 * weights[3] + 4 * weights[2] + 2 * weights[1] + weights[0]) / 15
    assert torch.allclose(decoder_rollout(traced.run), expected, atol=1e-6)


def test_both_over_the_places(traced: Any) -> None:
    found = attention_rollout(traced.run)
    product = decoder_rollout(traced.run) @ encoder_rollout(traced.run)  # (T, S)
    assert torch.allclose(product.sum(-1), torch.ones(len(product)), atol=1e-5)
    assert torch.equal(found.pooled, product[:, :1])
    assert torch.equal(found.places[:, 3, 7], product[:, 1 + 3 * 16 + 7])
    assert torch.equal(found.prompt, product[:, 1 + 24 * 16 :])
    assert torch.allclose(found.image_share + found.pooled.sum(-1) + found.prompt.sum(-1), torch.ones(len(product)))
