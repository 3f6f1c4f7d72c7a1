"""Teacher forcing, against the search and against the decoder run token by token."""

from typing import Any, cast

import pytest
import torch
from PIL import Image

from florence2 import EncodedImage, Florence2, GenerationOptions
from florence2.errors import OptionError, PromptError
from florence2.inspect import names_of
from florence2.inspect.forced import (
    Case,
    answer_again,
    answer_logprobs,
    answer_scores,
    force,
    force_all,
    likeliest_bins,
    stage_of,
)
from florence2.model.trace import start_trace
from florence2.tracing.patches import scale, zero
from tests.conftest import count_encodings

GROUND = "<CAPTION_TO_PHRASE_GROUNDING>"


def step_by_step(f: Florence2, case: Case) -> torch.Tensor:
    """The log-probabilities (T, V) of the path that generation takes, with whatever is in force."""
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
def case(mini: Florence2, pictures: list[Image.Image], few: GenerationOptions) -> Case:
    return force(mini, ("<OD>", pictures[0]), options=few)


def test_the_answer_is_that_of_a_run(mini: Florence2, pictures: list[Image.Image], few: GenerationOptions) -> None:
    request = (GROUND, pictures[0], "a green car")
    found, expected = force(mini, request, options=few), mini.run(*request, options=few)
    assert found.answer.token_ids == expected.token_ids and found.answer.text == expected.text
    assert len(found.logprobs) == len(found.kinds) == len(found.counted) == len(expected.token_ids) - 1


def test_log_probabilities_are_those_of_the_search(mini: Florence2, pictures: list[Image.Image]) -> None:
    """Where no rule acts: greedily, and but for the ids that are forced."""
    plain = mini.options(num_beams=1, max_new_tokens=12, no_repeat_ngram_size=0)
    case = force(mini, ("<OD>", pictures[1]), options=plain)
    expected = torch.tensor(mini.run("<OD>", pictures[1], options=plain).token_logprobs)
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
def test_it_is_what_generation_would_compute(mini: Florence2, case: Case, patches: dict, since: str) -> None:
    with mini.patched(patches):
        found, expected = answer_scores(mini, case, since), step_by_step(mini, case)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(answer_logprobs(mini, case), case.logprobs) and bool(patches) != torch.allclose(
        expected, answer_scores(mini, case), atol=1e-3
    )


def test_a_change_acts_from_where_it_is(mini: Florence2, case: Case) -> None:
    """A patch of the encoder is seen only when the memory is computed again, one of the tower with the picture."""
    for pattern, since in (("encoder.layers.0.mlp", "prompt"), ("vision_tower", "picture")):
        with mini.patched({pattern: scale(0.2)}):
            earlier = answer_logprobs(mini, case, "answer")
            found = answer_logprobs(mini, case, since)
            again = answer_again(mini, case, since, mini.options(num_beams=1, max_new_tokens=3)).token_ids
            direct = mini.run("<OD>", case.request[1], options=mini.options(num_beams=1, max_new_tokens=3)).token_ids
        assert torch.equal(earlier, case.logprobs) and not torch.allclose(found, case.logprobs, atol=1e-3)
        assert again == direct


def test_patches_in_force_take_no_part(
    mini: Florence2, pictures: list[Image.Image], case: Case, few: GenerationOptions
) -> None:
    with mini.patched({"memory": zero(), "vision_tower": zero()}):
        found = force(mini, ("<OD>", pictures[0]), options=few)
    assert found.answer.token_ids == case.answer.token_ids and torch.equal(found.logprobs, case.logprobs)


def test_kinds_and_what_counts(mini: Florence2, pictures: list[Image.Image]) -> None:
    case = force(mini, ("<OD>", pictures[0]), "a<loc_1><loc_2><loc_30><loc_999>")
    assert case.kinds == ("special", "word", *["location"] * 4, "special")
    assert case.counted == (False, *[True] * 6)  # the first id is forced
    assert case.positions("location") == [2, 3, 4, 5] and case.positions() == [1, 2, 3, 4, 5, 6]
    cut = force(mini, ("<OD>", pictures[0]), options=mini.options(max_new_tokens=4, min_new_tokens=4))
    assert cut.answer.finish_reason == "length" and cut.counted == (False, True, True, False)


def test_the_likeliest_location(mini: Florence2, case: Case) -> None:
    scores = answer_scores(mini, case)
    pieces = [mini.processor.decode([i]) for i in range(scores.shape[1])]
    locations = {i: piece for i, piece in enumerate(pieces) if piece.startswith("<loc_")}
    best = [locations[max(locations, key=lambda i: float(row[i]))] for row in scores]
    assert [f"<loc_{bin}>" for bin in likeliest_bins(mini, scores).tolist()] == best
    assert torch.equal(case.bins, likeliest_bins(mini, scores))


def test_a_picture_is_encoded_once(
    mini: Florence2, pictures: list[Image.Image], few: GenerationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_encodings(mini, monkeypatch)
    requests = [
        ("<OD>", pictures[0]),
        (GROUND, pictures[0], "a car"),
        ("<OD>", pictures[1]),
        ("<CAPTION>", pictures[0]),
    ]
    cases = force_all(mini, requests, few)
    assert calls == [1, 1]
    for case in cases:
        answer_logprobs(mini, case, "prompt")
    assert calls == [1, 1]
    answer_logprobs(mini, cases[1], "picture")
    assert calls == [1, 1, 1]
    assert [case.request for case in cases] == requests


def test_where_names_are(mini: Florence2) -> None:
    known = {name.name: name for name in names_of(mini.model.config)}
    layer, keys = known["decoder.layers.0"], known["decoder.layers.0.cross_attention.keys"]
    assert stage_of([layer, keys]) == "answer"
    assert stage_of([layer, known["memory"]]) == "prompt"
    assert stage_of([known["memory"], known["pixel_values"]]) == "picture"


def test_wrong_requests(mini: Florence2, pictures: list[Image.Image]) -> None:
    with pytest.raises(PromptError, match="takes no|needs"):
        force(mini, ("<OD>", pictures[0], "a car"))
    for wrong in ("<OD>", ("<OD>",)):
        with pytest.raises(PromptError, match=r"A request must be \(task, image\)"):
            force_all(mini, cast(Any, [wrong]))
    with pytest.raises(PromptError, match="more than the 1024 positions of the model"):
        force(mini, ("<OD>", pictures[0]), "<loc_1>" * 1024)
    with pytest.raises(OptionError, match="at least one"):
        force_all(mini, [])
    features = mini.encode_image(pictures[0])
    assert isinstance(features, EncodedImage)
    with pytest.raises(OptionError, match="give the picture"):
        answer_logprobs(mini, force(mini, ("<OD>", features), "car"), "picture")
