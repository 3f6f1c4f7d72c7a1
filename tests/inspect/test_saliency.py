"""Gradient x input against differences, in float64."""

from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from florence2 import Florence2
from florence2.errors import OptionError
from florence2.inspect import input_saliency
from florence2.inspect.saliency import saliency_of
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import Trace
from florence2.tracing.patches import zero_heads
from parity.cases import shapes
from parity.recipe import make_model

PROMPT, ANSWER = [0, 713, 92, 2], [0, 51000, 300, 2]


class Words(Trace):
    """Another embedding of each id of the prompt: `factors` (P,) times its own."""

    def __init__(self, factors: Tensor):
        self.factors = factors

    def wants(self, name: str) -> bool:
        return False

    def enters(self, prefix: str) -> bool:
        return False

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return value * self.factors[:, None] if name == "prompt" else value


@pytest.fixture(scope="module")
def model() -> Florence2Model:
    shape = shapes()[3]
    return make_model(shape.config, shape.seed, shape.end_bonus).double()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def log_probabilities(model: Florence2Model, pixels: Tensor, words: Tensor | None = None) -> Tensor:
    trace = Words(torch.ones(len(PROMPT)).double() if words is None else words)
    memory = model.encode(model.encode_image(pixels), torch.tensor([PROMPT]), trace=trace)
    logits = model.decode(torch.tensor([[2, *ANSWER[:-1]]]), memory)[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(ANSWER)[:, None])[:, 0]


def test_the_forward_pass_is_the_plain_one(model: Florence2Model, pixels: Tensor) -> None:
    with torch.inference_mode():  # gradients are taken all the same
        found = saliency_of(model, pixels, PROMPT, ANSWER)
    assert found.tokens == (0, 1, 2, 3) and found.image.shape == (4, 48, 64) and found.prompt.shape == (4, 4)
    assert torch.allclose(found.log_probabilities, log_probabilities(model, pixels), rtol=0, atol=1e-10)
    assert all(parameter.grad is None for parameter in model.parameters()) and not found.image.requires_grad


def test_along_the_input_it_is_what_differences_say(model: Florence2Model, pixels: Tensor) -> None:
    """Its sum is the slope of the log-probability as everything grows, whose sign it so has."""
    found, step = saliency_of(model, pixels, PROMPT, ANSWER), 1e-5
    more, less = (log_probabilities(model, pixels * (1 + sign * step)) for sign in (1, -1))
    slope = (more - less) / (2 * step)
    assert torch.allclose(found.image.sum((1, 2)), slope, rtol=1e-4, atol=1e-6) and slope.abs().max() > 0.1
    darker = log_probabilities(model, pixels * (1 - 1e-3)) - log_probabilities(model, pixels)
    assert torch.equal(darker.sign(), -found.image.sum((1, 2)).sign())


def test_of_each_pixel_and_each_word(model: Florence2Model, pixels: Tensor) -> None:
    found, step = saliency_of(model, pixels, PROMPT, ANSWER), 1e-5
    direction = torch.randn(48, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    more, less = (log_probabilities(model, pixels * (1 + sign * step * direction)) for sign in (1, -1))
    assert torch.allclose((found.image * direction).sum((1, 2)), (more - less) / (2 * step), rtol=1e-4, atol=1e-6)
    for word in range(len(PROMPT)):
        only = step * torch.eye(len(PROMPT)).double()[word]
        more, less = (log_probabilities(model, pixels, 1 + sign * only) for sign in (1, -1))
        assert torch.allclose(found.prompt[:, word], (more - less) / (2 * step), rtol=1e-4, atol=1e-6)
    assert found.prompt.abs().max() > 0.01


def test_some_tokens_alone(model: Florence2Model, pixels: Tensor) -> None:
    every, some = saliency_of(model, pixels, PROMPT, ANSWER), saliency_of(model, pixels, PROMPT, ANSWER, [2, 0])
    assert some.tokens == (2, 0)
    assert torch.allclose(some.image, every.image[[2, 0]]) and torch.allclose(some.prompt, every.prompt[[2, 0]])
    none = saliency_of(model, pixels, PROMPT, ANSWER, [])
    assert none.image.shape == (0, 48, 64) and none.prompt.shape == (0, 4) and none.by_cell((6, 8)).shape == (0, 6, 8)


@pytest.mark.parametrize("tokens", [[4], [-1], [0, 1.0], ["a"]])
def test_a_token_that_is_not_there(model: Florence2Model, pixels: Tensor, tokens: Any) -> None:
    with pytest.raises(OptionError, match=r"The answer has no token .*; its 4 tokens, the end included, are 0 to 3"):
        saliency_of(model, pixels, PROMPT, ANSWER, tokens)
    with pytest.raises(OptionError, match=r"tokens is 3; it must be several token numbers, as \[3\]"):
        saliency_of(model, pixels, PROMPT, ANSWER, cast(Any, 3))


def test_cells_add_up_their_pixels(model: Florence2Model, pixels: Tensor) -> None:
    found = saliency_of(model, pixels, PROMPT, ANSWER, [1, 3])
    cells = found.by_cell((6, 8))
    assert torch.allclose(cells[1, 2, 5], found.image[1, 16:24, 40:48].sum())
    assert torch.allclose(found.by_cell((5, 7)).sum((1, 2)), found.image.sum((1, 2)))


def test_of_a_traced_run(small: Florence2, images: list[Image.Image]) -> None:
    options = small.options(max_new_tokens=5, min_new_tokens=4, num_return_sequences=2)
    with small.trace("pixel_values", "=decoder.layers.0") as t:
        small.run("<OD>", images[0], options=options)
    run = t.run
    for alternative in range(2):
        found = input_saliency(small.model, run, [2], alternative)
        expected = saliency_of(small.model, run["pixel_values"][None], run.prompt_ids, run.answer_ids(alternative), [2])
        assert torch.equal(found.image, expected.image) and found.image.shape == (1, 160, 224)
    assert found.log_probabilities.tolist() == pytest.approx([run.answer.alternatives[0].token_logprobs[2]], abs=1e-4)


def test_a_patched_run_gets_a_sentence(small: Florence2, images: list[Image.Image]) -> None:
    options = small.options(max_new_tokens=5)
    patches = {"decoder.layers.0.cross_attention.heads": zero_heads([1, 2])}
    with small.patched(patches), small.trace("pixel_values", "=decoder.layers.0") as t:
        small.run("<OD>", images[0], options=options)
    with pytest.raises(OptionError, match=r"its last layer differs by .* compute it outside of f.patched"):
        input_saliency(small.model, t.run)
