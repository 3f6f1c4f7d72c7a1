"""Explanations: the answer is the run's own, and what is said of it are the model's own numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from florence2 import Florence2, GenerationOptions
from florence2.errors import OptionError, PromptError
from florence2.inspect import Explanation, explain
from florence2.inspect.explanation import explain_run, measure_spread, show_token
from florence2.tracing.patches import zero_heads


@pytest.fixture(scope="module")
def options(deep: Florence2) -> GenerationOptions:
    return deep.options(max_new_tokens=12, min_new_tokens=10)


@pytest.fixture(scope="module")
def found(deep: Florence2, images: list[Image.Image], options: GenerationOptions) -> Explanation:
    return explain(deep, "<REGION_PROPOSAL>", images[0], options=options, tokens=[1, 3])


def test_the_answer_is_that_of_the_run(
    deep: Florence2, images: list[Image.Image], options: GenerationOptions, found: Explanation
) -> None:
    answer = deep.run("<REGION_PROPOSAL>", images[0], options=options)
    assert found.answer.token_ids == answer.token_ids and len(answer.token_ids) > 10
    assert [token.id for token in found.tokens] == list(answer.token_ids[1:])
    assert [token.text for token in found.tokens] == list(answer.token_texts[1:])
    assert [token.probability for token in found.tokens] == pytest.approx(
        [math.exp(logprob) for logprob in answer.token_logprobs], abs=1e-4
    )
    assert "".join(piece.text for piece in found.prompt) == "<s>Locate the region proposals in the image.</s>"
    ids = [next(c.token for c in s.candidates if c.parent == w and c.token == i) for s, w, i in _along(found)]
    assert ids == list(answer.token_ids[1:])


def _along(found: Explanation) -> Any:
    return zip(found.beams, found.winner, found.answer.token_ids[1:], strict=False)


@pytest.mark.parametrize("beams", [1, 3])
def test_alternatives_are_the_softmax_of_the_scores(deep: Florence2, images: list[Image.Image], beams: int) -> None:
    options = deep.options(num_beams=beams, max_new_tokens=9, min_new_tokens=6, no_repeat_ngram_size=1)
    found = explain(deep, "<OD>", images[0], options=options, saliency=False)
    with deep.trace("=scores", "=logits") as t:
        deep.run("<OD>", images[0], options=options)
    logits, last = t.along_answer("logits"), len(found.tokens) - 1
    for n, (token, scores) in enumerate(zip(found.tokens, t.along_answer("scores"), strict=True)):
        likeliest = [other.probability for other in token.alternatives]
        expected = scores.exp().topk(8).values
        assert likeliest == pytest.approx(expected[expected > 0].tolist(), abs=1e-4)
        assert [float(scores[other.id].exp()) for other in token.alternatives] == pytest.approx(likeliest, abs=1e-4)
        if 0 < n < last:
            banned = {id for ban in token.bans for id in ban.ids}
            assert {ban.rule for ban in token.bans} >= {"no_repeat_ngram"} and banned >= {2, *t.run.answer_ids()[:n]}
            allowed = logits[n].clone()
            if beams == 1:  # the greedy search takes the softmax of what the rules left
                allowed[list(banned)] = float("-inf")
            assert likeliest == pytest.approx([float(allowed.softmax(-1)[a.id]) for a in token.alternatives], abs=1e-4)
    assert [(ban.rule, ban.only) for ban in found.tokens[0].bans if ban.only is not None] == [("forced_bos_token", 0)]
    assert [other.probability for other in found.tokens[0].alternatives] == [1.0]
    assert found.saliency is None


def test_every_layer_is_heard(deep: Florence2, found: Explanation) -> None:
    assert all(len(token.lens) == 5 and len(depth) == 3 for token in found.tokens for depth in token.lens)
    for token in found.tokens[1:9]:  # no rule speaks, so that the last layer says what the search heard
        free = [other for other in token.alternatives if not token.bans][:3]
        assert [(a.id, a.text) for a in token.lens[-1]][: len(free)] == [(a.id, a.text) for a in free]


def test_boxes_are_read_from_their_tokens(found: Explanation) -> None:
    assert [region.shape for region in found.regions] == list(found.answer.boxes) and len(found.regions) >= 2
    for region in found.regions:
        product = math.prod(found.tokens[token].probability for token in region.tokens)
        assert region.shape.score == pytest.approx(product**0.25, rel=1e-4)
        assert region.probabilities == pytest.approx([found.tokens[t].probability for t in region.tokens], rel=1e-4)
        assert region.parts is not None and region.parts.tokens == region.tokens
        assert region.parts.raw == pytest.approx(region.shape.confidence, abs=1e-4)
        x1 = found.tokens[region.tokens[0]].spread
        assert x1 is not None and region.shape.xyxy[0] == pytest.approx((x1.chosen + 0.5) * 320 / 1000, abs=1e-3)


def test_the_spread_of_locations(deep: Florence2, images: list[Image.Image], found: Explanation) -> None:
    for token in found.tokens:
        assert (token.spread is None) == ("<loc_" not in token.text)
        if token.spread is not None:
            assert token.text == f"<loc_{token.spread.chosen}>" and len(token.spread.probabilities) == 1000
            assert token.spread.probabilities[token.spread.chosen] == pytest.approx(token.probability, abs=1e-5)
            assert token.spread.mass == pytest.approx(sum(token.spread.probabilities), abs=1e-4)
    assert any(token.spread and token.spread.mass < 0.9999 for token in found.tokens)


def test_the_spread_by_its_formula() -> None:
    """A quarter at 100, three quarters at 104, of half of the probability."""
    probabilities = torch.zeros(1000)
    probabilities[100], probabilities[104] = 0.125, 0.375
    spread = measure_spread(probabilities, 104)
    assert (spread.chosen, spread.mass, spread.mean) == (104, 0.5, 103.0)
    assert spread.std == pytest.approx(math.sqrt(0.25 * 9 + 0.75 * 1)) and spread.distance == pytest.approx(2.0)


def test_maps_and_saliency_have_the_shapes_of_the_answer(found: Explanation) -> None:
    T, P = len(found.tokens), len(found.prompt)
    assert found.attention.places.shape == (T, 4, 3, 24, 16) and found.rollout.places.shape == (T, 24, 16)
    assert found.saliency is not None and found.saliency.tokens == (1, 3)
    assert found.saliency.image.shape == (2, 384, 256) and found.saliency.prompt.shape == (2, P)


def test_a_patched_model_can_be_explained(
    deep: Florence2, images: list[Image.Image], options: GenerationOptions, found: Explanation
) -> None:
    with deep.patched({"decoder.layers.*.cross_attention.heads": zero_heads([0, 2])}):
        other = explain(deep, "<REGION_PROPOSAL>", images[0], options=options, saliency=False)
        assert other.answer.token_ids == deep.run("<REGION_PROPOSAL>", images[0], options=options).token_ids
        with pytest.raises(OptionError, match=r"compute it outside of f\.patched, or leave it out"):
            explain(deep, "<REGION_PROPOSAL>", images[0], options=options, tokens=[1])
    assert [t.probability for t in other.tokens] != pytest.approx([t.probability for t in found.tokens], abs=1e-3)


def test_of_a_run_that_is_there_already(
    deep: Florence2, images: list[Image.Image], options: GenerationOptions, found: Explanation
) -> None:
    with deep.trace("**", limit=4 << 30) as t:
        deep.run("<REGION_PROPOSAL>", images[0], options=options)
    again = explain_run(deep, t.run, images[0], name="mine")
    assert again.name == "mine" and "Florence-2, " in found.name
    assert [(t.id, t.text) for t in again.tokens] == [(t.id, t.text) for t in found.tokens]
    assert torch.allclose(again.rollout.places, found.rollout.places, atol=1e-5)


def test_parts_of_a_character_are_shown_by_name(deep: Florence2) -> None:
    tokenizer = deep.processor.tokenizer
    parts = tokenizer.encode("🙂")[1:-1]
    assert [show_token(tokenizer, id) for id in parts] == [tokenizer.id_to_token(id) for id in parts]
    assert show_token(tokenizer, tokenizer.encode(" dog")[1]) == " dog" and show_token(tokenizer, 60000) == "[60000]"


def test_wrong_input_gets_a_sentence(deep: Florence2, images: list[Image.Image], options: GenerationOptions) -> None:
    with pytest.raises(OptionError, match="an EncodedImage does not contain; give the image"):
        explain(deep, "<OD>", deep.encode_image(images[0]))
    with pytest.raises(OptionError, match=r"tokens=\[1\] chooses tokens for saliency, but saliency is off"):
        explain(deep, "<OD>", images[0], tokens=[1], saliency=False)
    with pytest.raises(OptionError, match="The answer has no token 99; its"):
        explain(deep, "<OD>", images[0], options=options, tokens=[99])
    with pytest.raises(OptionError, match="more than the limit of 1.0 MB"):
        explain(deep, "<OD>", np.zeros((8, 8, 3), np.uint8), options=options, limit=1_000_000)
    with pytest.raises(PromptError, match="takes no box"):
        explain(deep, "<OD>", images[0], box=(1, 2, 3, 4))
