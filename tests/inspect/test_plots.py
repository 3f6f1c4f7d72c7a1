"""Figures of an explanation: what they show, and that they can be written."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from florence2.errors import OptionError
from florence2.inspect.page.render import decode_map
from florence2.inspect.plots import location_tokens, plot_attention, plot_lens, plot_location_spread, save_figure
from tests.inspect import synthetic


@pytest.fixture(scope="module")
def detection() -> dict[str, Any]:
    return synthetic.detection()


def weights_of(values: dict[str, Any], token: int, layer: int, head: int) -> np.ndarray:
    attention = values["tokens"][token]["attention"]
    stored = decode_map(attention["maps"][layer][head], synthetic.GRID, synthetic.GRID)
    weights: np.ndarray = stored * (attention["peak"][layer][head] / 255)
    return weights


@pytest.mark.parametrize(("layer", "head"), [(None, None), (4, None), (4, 7)])
def test_attention(layer: int | None, head: int | None, detection: dict[str, Any]) -> None:
    axes = plot_attention(detection, 3, layer, head).axes[0]
    image, heat = axes.get_images()
    layers, heads = (range(12) if one is None else [one] for one in (layer, head))
    expected = np.mean([weights_of(detection, 3, one, other) for one in layers for other in heads], axis=0)
    np.testing.assert_allclose(np.asarray(heat.get_array()), expected, rtol=1e-12)
    assert list(image.get_extent()) == list(heat.get_extent()) == [0, 600, 400, 0]
    assert len(axes.lines) == 1  # the cup's box, to which the token belongs, and no other
    place = {(None, None): "all layers", (4, None): "layer 5", (4, 7): "layer 5, head 8"}[layer, head]
    assert axes.get_title() == f"<loc_42> ({place})"


def test_lens(detection: dict[str, Any]) -> None:
    axes = plot_lens(detection).axes[0]
    (shares,) = axes.get_images()
    first = [[guesses[0] for guesses in token["lens"]] for token in detection["tokens"]]
    expected = np.array([[guess["probability"] for guess in column] for column in first]).T
    np.testing.assert_array_equal(np.asarray(shares.get_array()), expected)
    assert [text.get_text() for text in axes.texts[:13]] == [guess["text"][:9] for guess in first[0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["input", *map(str, range(1, 13))]
    assert len(plot_lens(detection, [1, 6]).axes[0].texts) == 26


def test_spread(detection: dict[str, Any]) -> None:
    axes = plot_location_spread(detection, 3).axes[0]
    bars = [bar.get_path().get_extents(bar.get_transform() - axes.transData) for bar in axes.patches]
    shown = [((bar.x0 + bar.x1) / 2, bar.y1) for bar in bars]
    np.testing.assert_allclose(shown, detection["tokens"][3]["spread"]["bins"], atol=1e-9)
    assert axes.get_title() == "<loc_42>: 42.4 ± 3.6 bins"
    assert location_tokens(detection) == [2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15]


def test_an_object_serves_as_well(detection: dict[str, Any]) -> None:
    assert location_tokens(SimpleNamespace(to_dict=lambda: detection))[0] == 2


def test_files(detection: dict[str, Any], tmp_path: Path) -> None:
    token = {**detection["tokens"][3], "text": "$\\frac$"}  # no formula
    for name in ("a.png", "a.svg", "b.svg"):
        save_figure(plot_location_spread({**detection, "tokens": [token]}, 0), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    one, other = (re.sub("p[0-9a-f]{10}", "clip", (tmp_path / name).read_text()) for name in ("a.svg", "b.svg"))
    assert one == other and "clip-path" in one


@pytest.mark.parametrize(
    ("plot", "arguments", "sentence"),
    [
        (plot_attention, (17,), "token is 17; the answer has 17 tokens, counted from 0."),
        (plot_attention, (-1,), "token is -1; the answer has"),
        (plot_attention, (1, 12), "layer is 12; the decoder has 12 layers, counted from 0."),
        (plot_attention, (1, 2, 12), "head is 12; the decoder has 12 heads"),
        (plot_attention, (1, None, 2), "head=2 needs a layer; give layer too."),
        (plot_lens, ([],), "tokens is empty; name at least one token of the answer."),
        (plot_location_spread, (1,), "Token 1, 'cup', is not a location; location tokens are 2, 3, 4, 5, 7,"),
    ],
)
def test_wrong_numbers_get_a_sentence(plot: Any, arguments: Any, sentence: str, detection: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as error:
        plot(detection, *arguments)
    assert str(error.value).startswith(sentence)
