"""Teacher forcing, against the search and against the decoder run token by token."""

from typing import Any, cast

import pytest
import torch
from PIL import Image

from florence2 import EncodedImage, Florence2, GenerationOptions, Task, add_tasks
from florence2.asking.requests import Request
from florence2.errors import OptionError, PromptError
from florence2.inspect.teacher_forcing import (
    ForcedAnswer,
    answer_again,
    answer_logprobs,
    answer_scores,
    likeliest_bins,
    stage_of,
    teacher_force,
    teacher_force_all,
)
from florence2.model.trace import start_trace
from florence2.tracing.names import names_of
from florence2.tracing.patches import scale, zero
from tests.conftest import count_encodings

GROUND = "<CAPTION_TO_PHRASE_GROUNDING>"


def step_by_step(f: Florence2, case: ForcedAnswer) -> torch.Tensor:
    """Return the log-probabilities (T, V) of the path that generation takes, with whatever is in force."""
    ids, trace, rows = case.answer.token_ids, start_trace(f), []
    with torch.no_grad():
        cache = f.model.start_cache(case.memory, 1, len(ids), trace=trace)
        for id in ids[:-1]:
            rows.append(f.model.step(torch.tensor([id]), cache, trace=trace)[0].log_softmax(dim=-1))
    return torch.stack(rows)


@pytest.fixture
def few(mini: Florence2) -> GenerationOptions:
    """Three beams, and answers of eight ids or more."""
    return mini.options(num_beams=3, max_new_tokens=12, min_new_tokens=8)


@pytest.fixture
def case(mini: Florence2, images: list[Image.Image], few: GenerationOptions) -> ForcedAnswer:
    return teacher_force(mini, ("<OD>", images[0]), options=few)


def test_the_answer_is_that_of_a_run(mini: Florence2, images: list[Image.Image], few: GenerationOptions) -> None:
    request = (GROUND, images[0], "a green car")
    found, expected = teacher_force(mini, request, options=few), mini.run(*request, options=few)
    assert found.answer.token_ids == expected.token_ids and found.answer.text == expected.text
    assert len(found.logprobs) == len(found.kinds) == len(found.counted) == len(expected.token_ids) - 1


def test_tasks_of_the_model_itself_are_known(
    mini: Florence2, images: list[Image.Image], few: GenerationOptions
) -> None:
    own = add_tasks(mini, Task("<COUNT>", "How many things?"))
    requests: list[Request] = [("<COUNT>", images[0]), ("count", images[0])]
    assert [case.answer.task for case in teacher_force_all(own, requests, few)] == ["<COUNT>", "<COUNT>"]
    with pytest.raises(PromptError, match="<COUNT>"):
        teacher_force(mini, requests[0], options=few)


def test_log_probabilities_are_those_of_the_search(mini: Florence2, images: list[Image.Image]) -> None:
    """Where no rule acts: greedily, and but for the ids that are forced."""
    plain = mini.options(num_beams=1, max_new_tokens=12, no_repeat_ngram_size=0)
    case = teacher_force(mini, ("<OD>", images[1]), options=plain)
    expected = torch.tensor(mini.run("<OD>", images[1], options=plain).token_logprobs)
    chosen = case.positions()
    assert torch.allclose(case.logprobs[chosen], expected[chosen], atol=1e-4)
    assert torch.allclose(answer_logprobs(mini, case), case.logprobs, atol=1e-6)


@pytest.mark.parametrize(
    ("patches", "since"),
    [
        ({}, "answer"),
        ({"decoder.layers.0.cross_attention.heads": zero()}, "answer"),
        ({"decoder.layers.0.self_attention": scale(0.3)}, "answer"),
    ],
)
def test_it_is_what_generation_would_compute(mini: Florence2, case: ForcedAnswer, patches: dict, since: str) -> None:
    with mini.patched(patches):
        found, expected = answer_scores(mini, case, since), step_by_step(mini, case)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(answer_logprobs(mini, case), case.logprobs) and bool(patches) != torch.allclose(
        expected, answer_scores(mini, case), atol=1e-3
    )


def test_a_change_acts_from_where_it_is(mini: Florence2, case: ForcedAnswer) -> None:
    """A patch of the encoder is seen only when the memory is computed again, one of the tower with the image."""
    for pattern, since in (("encoder.layers.0.mlp", "prompt"), ("vision_tower", "image")):
        with mini.patched({pattern: scale(0.2)}):
            earlier = answer_logprobs(mini, case, "answer")
            found = answer_logprobs(mini, case, since)
            again = answer_again(mini, case, since, mini.options(num_beams=1, max_new_tokens=3)).token_ids
            direct = mini.run("<OD>", case.request[1], options=mini.options(num_beams=1, max_new_tokens=3)).token_ids
        assert torch.equal(earlier, case.logprobs) and not torch.allclose(found, case.logprobs, atol=1e-3)
        assert again == direct


def test_patches_in_force_take_no_part(
    mini: Florence2, images: list[Image.Image], case: ForcedAnswer, few: GenerationOptions
) -> None:
    with mini.patched({"memory": zero(), "vision_tower": zero()}):
        found = teacher_force(mini, ("<OD>", images[0]), options=few)
    assert found.answer.token_ids == case.answer.token_ids and torch.equal(found.logprobs, case.logprobs)


def test_kinds_and_what_counts(mini: Florence2, images: list[Image.Image]) -> None:
    case = teacher_force(mini, ("<OD>", images[0]), "a<loc_1><loc_2><loc_30><loc_999>")
    assert case.kinds == ("special", "word", *["location"] * 4, "special")
    assert case.counted == (False, *[True] * 6)  # the first id is forced
    assert case.positions("location") == [2, 3, 4, 5] and case.positions() == [1, 2, 3, 4, 5, 6]
    cut = teacher_force(mini, ("<OD>", images[0]), options=mini.options(max_new_tokens=4, min_new_tokens=4))
    assert cut.answer.finish_reason == "length" and cut.counted == (False, True, True, False)


def test_the_likeliest_location(mini: Florence2, case: ForcedAnswer) -> None:
    scores = answer_scores(mini, case)
    pieces = [mini.processor.decode([i]) for i in range(scores.shape[1])]
    locations = {i: piece for i, piece in enumerate(pieces) if piece.startswith("<loc_")}
    best = [locations[max(locations, key=lambda i: float(row[i]))] for row in scores]
    assert [f"<loc_{bin}>" for bin in likeliest_bins(mini, scores).tolist()] == best
    assert torch.equal(case.bins, likeliest_bins(mini, scores))


def test_an_image_is_encoded_once(
    mini: Florence2, images: list[Image.Image], few: GenerationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_encodings(mini, monkeypatch)
    requests = [
        ("<OD>", images[0]),
        (GROUND, images[0], "a car"),
        ("<OD>", images[1]),
        ("<CAPTION>", images[0]),
    ]
    cases = teacher_force_all(mini, requests, few)
    assert calls == [1, 1]
    for case in cases:
        answer_logprobs(mini, case, "prompt")
    assert calls == [1, 1]
    answer_logprobs(mini, cases[1], "image")
    assert calls == [1, 1, 1]
    assert [case.request for case in cases] == requests


def test_where_names_are(mini: Florence2) -> None:
    known = {name.name: name for name in names_of(mini.model.config)}
    layer, keys = known["decoder.layers.0"], known["decoder.layers.0.cross_attention.keys"]
    assert stage_of([layer, keys]) == "answer"
    assert stage_of([layer, known["memory"]]) == "prompt"
    assert stage_of([known["memory"], known["pixel_values"]]) == "image"


def test_wrong_requests(mini: Florence2, images: list[Image.Image]) -> None:
    with pytest.raises(PromptError, match="takes no|needs"):
        teacher_force(mini, ("<OD>", images[0], "a car"))
    for wrong in ("<OD>", ("<OD>",)):
        with pytest.raises(PromptError, match=r"A request must be \(task, "):
            teacher_force_all(mini, cast(Any, [wrong]))
    with pytest.raises(PromptError, match="more than the 1024 positions of the model"):
        teacher_force(mini, ("<OD>", images[0]), "<loc_1>" * 1024)
    with pytest.raises(OptionError, match="at least one"):
        teacher_force_all(mini, [])
    features = mini.encode_image(images[0])
    assert isinstance(features, EncodedImage)
    with pytest.raises(OptionError, match="give the image"):
        answer_logprobs(mini, teacher_force(mini, ("<OD>", features), "car"), "image")
