"""The JSON of an explanation: strict, complete, and what its bytes say."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from florence2 import Florence2
from florence2.inspect import Explanation, explain
from florence2.inspect.explanation_json import MAX_SIDE, image_data
from parity.recipe import make_picture


@pytest.fixture(scope="module")
def found(deep: Florence2, images: list[Image.Image]) -> Explanation:
    options = deep.options(max_new_tokens=9, min_new_tokens=8)
    return explain(deep, "<REGION_PROPOSAL>", images[0], options=options, tokens=[2])


@pytest.fixture(scope="module")
def plain(found: Explanation) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    values = json.loads(found.to_json(), parse_constant=refuse)  # no NaN, no Infinity
    assert values == found.to_dict()
    return values


def decoded(data: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(shape)


def test_every_key_is_there(plain: Any) -> None:
    assert list(plain) == "format model image task prompt answer tokens beams winner".split()
    assert plain["format"] == 1 and set(plain["model"]) == {"name", "layers", "heads", "vision"}
    assert set(plain["image"]) == {"width", "height", "grid", "pooled", "data"}
    assert set(plain["answer"]) == set(
        "kind text score confidence calibrated finish_reason boxes quads polygons".split()
    )
    keys = set("id text probability location alternatives banned lens attention saliency spread".split())
    for token in plain["tokens"]:
        assert set(token) == keys
        assert set(token["attention"]) == {"peak", "image", "maps", "prompt", "rollout"}
        assert all(set(other) == {"id", "text", "probability"} for other in token["alternatives"])
        assert all(set(ban) == {"rule", "count", "texts"} for ban in token["banned"])
    for step in plain["beams"]:
        assert set(step) == {"step", "candidates", "bans"}
        assert all(
            set(c) == {"token", "text", "parent", "beam", "sum", "fate"} and c["sum"] >= -1e9
            for c in step["candidates"]
        )
        assert all(set(ban) == {"rule", "beam", "count", "texts"} and len(ban["texts"]) <= 8 for ban in step["bans"])


def test_what_was_asked_and_answered(plain: Any, found: Explanation) -> None:
    assert plain["task"] == "<REGION_PROPOSAL>" and plain["model"]["layers"] == 4 and plain["model"]["heads"] == 3
    assert (plain["image"]["width"], plain["image"]["height"]) == (320, 200)
    assert plain["image"]["grid"] == [24, 16] and plain["image"]["pooled"] == 1
    assert [token["id"] for token in plain["tokens"]] == list(found.answer.token_ids[1:])
    answer = plain["answer"]
    assert answer["kind"] == "proposals" and answer["text"] == found.answer.text and answer["boxes"]
    assert answer["calibrated"] is False
    for box, expected, region in zip(answer["boxes"], found.answer.boxes, found.regions, strict=True):
        assert box["xyxy"] == pytest.approx(expected.xyxy, abs=0.01) and box["label"] == expected.label
        assert box["score"] == pytest.approx(expected.score, abs=1e-4)
        assert box["confidence"]["value"] == pytest.approx(expected.confidence, abs=1e-4)
        assert region.parts is not None and box["confidence"]["near"] == pytest.approx(region.parts.near, abs=1e-4)
        assert box["confidence"]["label"] == pytest.approx(region.parts.label, abs=1e-4)
        assert box["tokens"] == [region.tokens[0], region.tokens[-1]]
        first, last = box["tokens"]
        assert last - first == 3 and all(token["location"] is not None for token in plain["tokens"][first : last + 1])


def test_the_beams_lead_to_the_answer(plain: Any, found: Explanation) -> None:
    for step, winner, token in zip(plain["beams"], plain["winner"], plain["tokens"], strict=False):
        assert any(
            c["token"] == token["id"] and c["parent"] == (winner if step["step"] else None) for c in step["candidates"]
        )
    assert len(plain["winner"]) == len(plain["tokens"])
    forced = plain["tokens"][0]["banned"]
    assert {"rule": "forced_bos_token", "count": 51288, "texts": ["everything but <s>"]} in forced


def test_bytes_are_parts_of_the_peaks(plain: Any, found: Explanation) -> None:
    for n, token in enumerate(plain["tokens"]):
        attention, places = token["attention"], found.attention.places[n]
        for layer in range(4):
            for head in range(3):
                peak, weights = attention["peak"][layer][head], places[layer, head].numpy()
                words = found.attention.prompt[n, layer, head]
                assert peak == pytest.approx(max(weights.max(), float(words.max())), rel=1e-3)
                shown = decoded(attention["maps"][layer][head], 24, 16) / 255 * peak
                assert np.abs(shown - weights).max() <= peak * 0.003
                prompt = torch.tensor(attention["prompt"][layer][head]) / 255 * peak
                assert torch.allclose(prompt, words, atol=peak * 0.003)
                assert attention["image"][layer][head] == pytest.approx(float(weights.sum()), abs=1e-4)
        rollout = found.rollout.places[n].numpy()
        assert np.abs(decoded(attention["rollout"], 24, 16) / 255 - rollout / rollout.max()).max() < 0.003


def test_saliency_where_it_was_asked_for(plain: Any, found: Explanation) -> None:
    assert [n for n, token in enumerate(plain["tokens"]) if token["saliency"] is not None] == [2]
    shown, saliency = plain["tokens"][2]["saliency"], found.saliency
    assert saliency is not None
    cells = saliency.by_cell((24, 16))[0].abs().numpy()
    assert np.abs(decoded(shown["image"], 24, 16) / 255 - cells / cells.max()).max() < 0.003
    assert shown["prompt"] == pytest.approx(saliency.prompt[0].tolist(), rel=1e-3)


def test_the_bins_around_a_location(plain: Any) -> None:
    seen = 0
    for token in plain["tokens"]:
        if token["spread"] is not None:
            bins = [bin for bin, _ in token["spread"]["bins"]]
            assert len(bins) == 40 and bins == list(range(bins[0], bins[0] + 40)) and 0 <= bins[0] <= 960
            own = dict(token["spread"]["bins"])[token["location"]]
            assert own == pytest.approx(token["probability"], abs=2e-4)
            assert set(token["spread"]) == {"bins", "mean", "std"}
            seen += 1
    assert seen >= 4


def test_an_image_is_shown_small() -> None:
    large = make_picture(3, 2100, 700)
    prefix, data = image_data(large).split(",")
    assert prefix == "data:image/jpeg;base64" and large.size == (2100, 700)
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert shown.format == "JPEG" and shown.size == (MAX_SIDE, round(MAX_SIDE / 3))
