"""Finished answers are read again: their probabilities are those of `decode`, however the answers were found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import florence2
from florence2.generation.engine import forced
from florence2.inspect import patches

SCENE = Path(florence2.__file__).parent.parent / "docs" / "scene.png"


@pytest.fixture(scope="module")
def nano() -> florence2.Florence2:
    return florence2.load("nano", device="cpu")


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return Image.open(SCENE).convert("RGB")


QUESTIONS = [("<OD>",), ("<CAPTION>",), ("<OCR_WITH_REGION>",), ("<REFERRING_EXPRESSION_SEGMENTATION>", "a triangle")]


def confidences(answer: florence2.Answer) -> list[float | None]:
    shapes: list[Any] = [*answer.boxes, *answer.quads, *answer.polygons]
    return [each.confidence for each in shapes] if answer.kind != "text" else [answer.confidence]


def test_they_are_those_of_decode(nano: florence2.Florence2, scene: Image.Image) -> None:
    model, ids = nano.model, nano.processor.location_ids
    with torch.no_grad():
        memory = model.encode(
            nano.encode_image(scene).features, torch.tensor([nano.processor.prompt("<MORE_DETAILED_CAPTION>")])
        )
        generation = florence2.generate(model, memory, nano.options(num_return_sequences=2))
        scores = model.decode(generation.sequences[:, :-1], memory.expand(2, -1, -1)).log_softmax(dim=-1)
    assert generation.sequences.shape[1] > forced._POSITIONS // 2  # so that its positions are read in parts
    [again] = forced.read_again(model, [(generation, memory)], ids)
    own = scores.gather(2, generation.sequences[:, 1:, None])[:, :, 0]
    assert torch.allclose(again.forced_logprobs, own, atol=1e-5)
    assert torch.allclose(again.location_probabilities, scores[:, :, list(ids)].exp(), atol=1e-6)


@pytest.mark.release
def test_every_way_gives_the_same(nano: florence2.Florence2, scene: Image.Image) -> None:
    """Alone, in a batch of the engine, in a padded one, traced, and by the plain model without packed weights."""
    alone = [nano.run(task, scene, *text) for task, *text in QUESTIONS]
    requests = [(task, scene, *text) for task, *text in QUESTIONS]
    with nano.trace("memory"):
        traced = nano.run_batch(requests)
    plain = florence2.load("nano", device="cpu", attention="eager").run_batch(requests)
    for answers in (nano.run_batch(requests), nano.run_batch(requests, batch_size=2), traced, plain):
        for one, other in zip(alone, answers, strict=True):
            assert one.token_ids == other.token_ids and confidences(one)
            assert confidences(other) == pytest.approx(confidences(one), abs=1e-4)


def test_answers_that_are_read_together_are_those_read_alone(nano: florence2.Florence2, scene: Image.Image) -> None:
    """Of other lengths, with memories of other lengths, and more rows than are read at once."""
    model, ids, features = nano.model, nano.processor.location_ids, nano.encode_image(scene).features
    finished, alone = [], []
    for task, rows in (("<CAPTION>", 3), ("<OD>", 3), ("<MORE_DETAILED_CAPTION>", 3)):
        with torch.no_grad():
            memory = model.encode(features, torch.tensor([nano.processor.prompt(task)]))
        generation = florence2.generate(model, memory, nano.options(num_return_sequences=rows))
        finished.append((generation, memory))
        alone += forced.read_again(model, finished[-1:], ids)
    together = forced.read_again(model, finished, ids)
    for one, other in zip(alone, together, strict=True):
        assert one.forced_logprobs is not None and other.forced_logprobs is not None
        for row, length in enumerate(one.lengths.tolist()):
            close = torch.allclose(one.forced_logprobs[row, :length], other.forced_logprobs[row, :length], atol=1e-4)
            assert close and other.location_probabilities.shape == one.location_probabilities.shape


def test_beams_do_not_matter(nano: florence2.Florence2, scene: Image.Image) -> None:
    """Equal answers of different searches have equal confidences."""
    answers = [nano.run("<OD>", scene, num_beams=beams) for beams in (1, 2, 3, 5)]
    assert len({answer.token_ids for answer in answers}) == 1
    for answer in answers[1:]:
        assert confidences(answer) == pytest.approx(confidences(answers[0]), abs=1e-4)


def test_it_changes_no_token_and_can_be_left_out(nano: florence2.Florence2, scene: Image.Image) -> None:
    with_it, without = (nano.run("<OD>", scene, confidence=given) for given in (True, False))
    assert with_it.token_ids == without.token_ids and with_it.token_logprobs == without.token_logprobs
    assert confidences(without) == [None] * len(without.boxes) and without.calibrated is None
    assert all(0 < value <= 1 for value in confidences(with_it) if value is not None)


def test_alternatives_have_confidences_too(nano: florence2.Florence2, scene: Image.Image) -> None:
    answer = nano.run("<CAPTION>", scene, num_return_sequences=3)
    assert all(other.confidence is not None for other in answer.alternatives) and len(answer.alternatives) == 2


def test_patched_steps_have_none(nano: florence2.Florence2, scene: Image.Image) -> None:
    """A patch of the steps does not act on a reading of the whole; one of the memory is in it already."""
    with nano.patched({"decoder.layers.2.cross_attention.heads": patches.zero_heads([3])}):
        assert nano.run("<CAPTION>", scene).confidence is None
    with nano.patched({"memory": patches.scale(1.0)}):
        assert nano.run("<CAPTION>", scene).confidence == pytest.approx(nano.run("<CAPTION>", scene).confidence)


def test_other_checkpoints_stay_within_range(small: florence2.Florence2, scene: Image.Image) -> None:
    """One with random weights."""
    for task, *text in QUESTIONS:
        answer = small.run(task, scene, *text, max_new_tokens=40)
        assert all(value is not None and 0 <= value <= 1 for value in confidences(answer))
        assert answer.calibrated is False
