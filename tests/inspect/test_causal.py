"""Causal tracing: what carries everything, what carries nothing, and a value moved by hand."""

import json
from typing import Any

import pytest
import torch
from PIL import Image

from florence2 import Florence2
from florence2.errors import OptionError
from florence2.inspect.causal import CausalEffect, causal_tracing
from florence2.inspect.teacher_forcing import teacher_force
from florence2.pipeline import Request

ANSWER = "a circle<loc_100><loc_200><loc_300><loc_400>"
GROUND = "<CAPTION_TO_PHRASE_GROUNDING>"


@pytest.fixture
def ends(mini: Florence2, images: list[Image.Image]) -> tuple[Request, Request]:
    """Two images with one prompt, that after which the answer is more probable first."""
    first, second = (("<OD>", image) for image in images)
    better = (
        teacher_force(mini, first, ANSWER).logprobs[1:].mean() > teacher_force(mini, second, ANSWER).logprobs[1:].mean()
    )
    return (first, second) if better else (second, first)


def rows(found: Any) -> dict[tuple[str, str], CausalEffect]:
    return {(row.name, row.group): row for row in found.rows}


def test_what_carries_everything_and_what_carries_nothing(mini: Florence2, ends: tuple[Request, Request]) -> None:
    names = [
        "pixel_values",
        "vision_tower",
        "image_tokens",
        "prompt",
        "encoder.layers.*",
        "decoder.embedding",
        "logits",
    ]
    found = causal_tracing(mini, *ends, names, answer=ANSWER)
    by = rows(found)
    for name, group in (("pixel_values", "all"), ("vision_tower", "all"), ("image_tokens", "all")):
        assert by[name, group].restored == pytest.approx(1, abs=1e-4)
        assert by[name, group].logprob == pytest.approx(found.clean, abs=1e-5)
    assert by["prompt", "all"].restored == pytest.approx(0, abs=1e-4)  # the prompts are the same
    for kind in ("word", "location", "special"):
        assert by["decoder.embedding", kind].restored == pytest.approx(0, abs=1e-4)
    kinds = [by["logits", kind] for kind in ("word", "location", "special")]
    # where they are predicted, tokens stand for themselves: together with the start, which does not count
    assert sum(row.restored for row in kinds) == pytest.approx(1, abs=1e-3)
    assert found.clean > found.corrupt and found.answer.endswith(ANSWER + "</s>")


def test_the_ends_are_the_two_runs(mini: Florence2, ends: tuple[Request, Request]) -> None:
    cases = [teacher_force(mini, request, ANSWER) for request in ends]
    expected = [float(case.logprobs[case.positions("location")].mean()) for case in cases]
    if expected[0] < expected[1]:  # the words may have made the other the better one
        ends, expected = ends[::-1], expected[::-1]
    found = causal_tracing(mini, *ends, ["memory"], answer=ANSWER, kind="location")
    assert [found.clean, found.corrupt] == pytest.approx(expected, abs=1e-6)


def test_a_group_of_the_memory_by_hand(mini: Florence2, ends: tuple[Request, Request]) -> None:
    groups = {"some": [0, 3, 4, 60], "one": [66]}
    found = rows(causal_tracing(mini, *ends, ["memory", "encoder.layers.1"], answer=ANSWER, groups=groups))
    clean, corrupt = (teacher_force(mini, request, ANSWER) for request in ends)
    for words, positions in groups.items():
        memory = corrupt.memory.clone()
        memory[:, positions] = clean.memory[:, positions]
        with torch.no_grad():
            scores = mini.model.decode(clean.inputs, memory)[0].log_softmax(dim=-1)
        ids = torch.tensor(clean.answer.token_ids[1:])
        expected = float(scores.gather(1, ids[:, None])[clean.positions(), 0].mean())
        for name in ("memory", "encoder.layers.1"):  # which are the same
            assert found[name, words].logprob == pytest.approx(expected, abs=1e-5)
        assert found["memory", words].positions == len(positions)
        assert abs(found["memory", words].restored) > 1e-3


def test_positions_of_the_answer_by_hand(mini: Florence2, ends: tuple[Request, Request]) -> None:
    """The last layer at some positions is the logits there."""
    found = rows(causal_tracing(mini, *ends, ["decoder.layers.*", "logits"], answer=ANSWER))
    clean, corrupt = (teacher_force(mini, request, ANSWER) for request in ends)
    for kind in ("word", "location"):
        mixed = corrupt.logprobs.clone()
        mixed[clean.positions(kind)] = clean.logprobs[clean.positions(kind)]
        expected = float(mixed[clean.positions()].mean())
        for name in ("decoder.layers.1", "logits"):
            assert found[name, kind].logprob == pytest.approx(expected, abs=1e-5)
    # what the first layer has at one position reaches later ones, too
    assert found["decoder.layers.0", "word"].logprob != pytest.approx(found["logits", "word"].logprob, abs=1e-3)


def test_heads_weights_and_windows(mini: Florence2, ends: tuple[Request, Request]) -> None:
    """Keys and values together are all that the memory is to a layer; windows are moved as a whole."""
    cross = "decoder.layers.1.cross_attention"
    names = [f"{cross}.*", "decoder.layers.0.self_attention.weights", "vision_tower.blocks.*.*.*.window_attn.weights"]
    found = causal_tracing(mini, *ends, names, answer=ANSWER)
    by = rows(found)
    assert (f"{cross}.keys", "image") in by and (f"{cross}.values", "prompt") in by
    assert by[f"{cross}.heads", "location"].positions == 4
    windows = by["vision_tower.blocks.0.0.spatial_block.window_attn.weights", "all"]
    assert windows.positions is None and abs(windows.restored) > 1e-4
    # the last layer's heads are all that differs there but for the stream below
    assert abs(by[f"{cross}.heads", "location"].restored) > abs(by[f"{cross}.weights", "special"].restored)


def test_another_prompt_of_the_same_length(mini: Florence2, images: list[Image.Image]) -> None:
    one, two = ((GROUND, images[0], f"a red {shape}") for shape in ("star", "heart"))
    lengths = {len(mini.processor.prompt(*request[::2])) for request in (one, two)}
    assert len(lengths) == 1
    first, second = (teacher_force(mini, request, ANSWER).logprobs[1:].mean() for request in (one, two))
    ends = (one, two) if first > second else (two, one)
    by = rows(causal_tracing(mini, *ends, ["image_tokens", "prompt"], answer=ANSWER))
    assert by["prompt", "all"].restored == pytest.approx(1, abs=1e-3)
    assert by["image_tokens", "all"].restored == pytest.approx(0, abs=1e-3)


def test_the_table(mini: Florence2, ends: tuple[Request, Request]) -> None:
    found = causal_tracing(mini, *ends, ["encoder.layers.*", "logits"], answer=ANSWER)
    restored = [row.restored for row in found.sorted().rows]
    assert restored == sorted((row.restored for row in found.rows), reverse=True) != [r.restored for r in found.rows]
    lines = found.format(2).splitlines()
    assert len(lines) == 5 and lines[1].split()[-2:] == [f"{found.clean:.4f}", "1"]
    assert lines[3].split() == [
        "encoder.layers.0",
        "image",
        "65",
        *(f"{v:.4f}" for v in (found.rows[0].logprob, found.rows[0].restored)),
    ]
    assert json.loads(found.to_json())["rows"][0] == vars(found.rows[0])
    assert len(str(found).splitlines()) == 3 + len(found.rows)


def test_what_cannot_be_traced(mini: Florence2, ends: tuple[Request, Request]) -> None:
    clean, corrupt = ends
    longer = (GROUND, corrupt[1], "a car beside a house with a red door")
    for arguments, more, message in (
        ((clean, longer, ["memory"]), {}, r"The prompts have \d+ and \d+ ids"),
        ((clean, clean, ["memory"]), {}, "is not less probable"),
        ((corrupt, clean, ["memory"]), {}, "is not less probable"),
        ((clean, corrupt, ["memori"]), {}, "The nearest names are memory"),
        ((clean, corrupt, ["scores"]), {}, "scores belongs to the search"),
        ((clean, corrupt, ["memory"]), {"groups": {"far": [900]}}, "The group 'far' has the position 900; memory has"),
        ((clean, corrupt, ["memory"]), {"groups": {"none": []}}, "The group 'none' is empty; memory has"),
        ((clean, corrupt, ["memory"]), {"limit": 100}, "limit"),
        (
            (clean, corrupt, ["memory"]),
            {"kind": "words"},
            "Unknown kind of tokens 'words'. Known kinds: word, location",
        ),
        ((clean, corrupt, ["memory"]), {"answer": "<loc_1>", "kind": "word"}, "has no token to score"),
    ):
        with pytest.raises(OptionError, match=message):
            causal_tracing(mini, *arguments, **{"answer": ANSWER, **more})


def test_progress_goes_to_the_callback_and_nowhere_else(
    mini: Florence2, ends: tuple[Request, Request], capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[tuple[int, int]] = []
    names = ["memory", "logits"]
    found = causal_tracing(mini, *ends, names, answer=ANSWER, progress=lambda done, total: shown.append((done, total)))
    assert shown == [(done, len(found.rows)) for done in range(1, len(found.rows) + 1)] and len(shown) == 5
    assert capsys.readouterr() == ("", "")
