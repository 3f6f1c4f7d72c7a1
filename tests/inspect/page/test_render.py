"""The page as a file: one, small, closed to the network, harmless. `tests/browser` opens it."""

import base64
import copy
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from florence2.errors import Florence2Error
from florence2.inspect.page.render import LIMIT, PRECISIONS, Precision, _coarser, decode_map, render_page
from tests.inspect import synthetic
from tests.release import keep

HOSTILE = "</script><img src=x onerror=\"document.title='got'\">{{script}}'&"


@pytest.fixture(scope="module")
def caption() -> dict[str, Any]:
    return synthetic.caption()


@pytest.fixture(scope="module")
def page(caption: dict[str, Any]) -> str:
    return render_page(caption)


class Elements(HTMLParser):
    """Every element with its attributes, and the text before its end or its first child."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.texts.append("")
        self.open = True

    def handle_endtag(self, tag):
        self.open = False

    def handle_data(self, data):
        if self.texts and self.open:
            self.texts[-1] += data

    def code(self, tag: str) -> str:
        """Return the page's only style, or its only script that runs."""
        (text,) = (self.texts[i] for i, found in enumerate(self.found) if found == (tag, {}))
        return text


def blocks(page: str) -> tuple[dict[str, Any], bytes]:
    """Return what the page's script reads: the head and the maps."""
    packed = re.findall(r'<script type="text/plain" id="data-(?:head|maps)">([^<]+)</script>', page)
    head, maps = (zlib.decompress(base64.b64decode(text)) for text in packed)
    return json.loads(head), maps


def map_of(page: str, token: int, layer: int, head: int) -> np.ndarray:
    """Return the cells of one head, read as the page's script does."""
    data, maps = blocks(page)
    side = -(-synthetic.GRID // data["packing"]["pool"])
    start = token * data["packing"]["stride"] + (layer * synthetic.HEADS + head) * side * side
    return np.frombuffer(maps[start : start + side * side], np.uint8).reshape(side, side)


def test_a_caption_is_whole_and_under_the_limit(page: str, caption: dict[str, Any]) -> None:
    assert len(caption["tokens"]) == 31 and len(page.encode()) < LIMIT == 5_000_000
    data, maps = blocks(page)
    assert data["packing"]["pool"] == 1 and data["packing"]["levels"] == 256
    assert len(maps) == 31 * data["packing"]["stride"]
    assert data["beams"] == caption["beams"] and data["answer"] == caption["answer"]
    for token, layer, head in ((0, 0, 0), (17, 5, 11), (30, 11, 11)):
        expected = decode_map(
            caption["tokens"][token]["attention"]["maps"][layer][head], synthetic.GRID, synthetic.GRID
        )
        np.testing.assert_array_equal(map_of(page, token, layer, head), expected)
    pieces = caption["tokens"][30]
    words, cells = 12 * 12 * len(caption["prompt"]), synthetic.GRID**2
    tail = np.array(pieces["attention"]["prompt"], np.uint8).tobytes() + b"".join(
        base64.b64decode(text) for text in (pieces["attention"]["rollout"], pieces["saliency"]["image"])
    )
    assert len(tail) == words + 2 * cells and maps.endswith(tail)


def test_maps_that_compress_to_nothing_fit_too(caption: dict[str, Any]) -> None:
    """Noise in every cell, as of an untrained model."""
    noisy, rng = copy.deepcopy(caption), np.random.default_rng(0)
    for token in noisy["tokens"]:
        noise = rng.integers(0, 256, (synthetic.LAYERS, synthetic.HEADS, synthetic.GRID**2), np.uint8)
        token["attention"]["maps"] = [[base64.b64encode(one.tobytes()).decode() for one in row] for row in noise]
    assert len(render_page(noisy).encode()) < LIMIT


@pytest.mark.parametrize(("limit", "number"), keep([1], [(2_300_000, 1), (900_000, 2), (1, -1)]))
def test_a_long_answer_is_kept_more_coarsely(limit: int, number: int, caption: dict[str, Any], page: str) -> None:
    small, precision = render_page(caption, limit), PRECISIONS[number]
    data, _ = blocks(small)
    assert (data["packing"]["pool"], data["packing"]["levels"]) == (precision.pool, precision.levels)
    assert len(small) < limit or number == -1
    fine, side = map_of(page, 3, 4, 5).astype(float), synthetic.GRID // precision.pool
    means = fine.reshape(side, precision.pool, side, precision.pool).mean(axis=(1, 3))
    assert np.abs(map_of(small, 3, 4, 5) - means).max() <= 255 / (precision.levels - 1) + 0.5


def test_a_grid_that_does_not_divide() -> None:
    maps = np.full((2, 5, 7), 200, np.uint8)
    maps[1, 4, 6] = 0
    coarse = _coarser(maps, Precision(2, 256))
    assert coarse.shape == (2, 3, 4) and coarse[1, 2, 3] == 0
    assert np.abs(coarse[0].astype(int) - 200).max() <= 1


def test_nothing_is_asked_of_the_network(page: str) -> None:
    for tag, attributes in Elements(page).found:
        for name in ("src", "href", "action", "srcset", "poster", "data", "style"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes[name][:80])
        assert not [name for name in attributes if name.startswith("on")]
    code = Elements(page).code("style") + Elements(page).code("script")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(|eval\(|innerHTML", code)
    assert set(re.findall(r"https?://[^\"'`\s]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_the_policy_allows_its_own_script_and_style_only(page: str) -> None:
    found = Elements(page)
    policy = next(a["content"] for tag, a in found.found if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.keys() == {"default-src", "img-src", "base-uri", "form-action", "style-src", "script-src"}
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "data:")
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.code(tag).encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def hostile(values: Any) -> Any:
    """Every text that a model or a user could have chosen, replaced."""
    names = ("text", "label", "rule", "name", "finish_reason")
    if isinstance(values, dict):
        changed = {key: HOSTILE if key in names else hostile(value) for key, value in values.items()}
        return {**changed, **({"texts": [HOSTILE]} if "texts" in values else {})}
    return [hostile(value) for value in values] if isinstance(values, list) else values


def test_texts_stay_texts(page: str) -> None:
    values = {**hostile(synthetic.detection()), "task": HOSTILE}
    spoilt, plain = Elements(render_page(values)), Elements(page)
    assert [tag for tag, _ in spoilt.found] == [tag for tag, _ in plain.found]
    assert HOSTILE not in render_page(values)
    data, _ = blocks(render_page(values))
    assert data["answer"]["boxes"][0]["label"] == HOSTILE == data["tokens"][3]["text"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, "The explanation has the format 2; this version reads 1. Create it again."),
        (
            {"image": {"data": "https://example.org/a.png"}},
            "begins with 'https://example.org/a.png'; it must be a data",
        ),
        ({"image": {"data": 'data:image/png;base64,AA"onload="'}}, "it must be a data URL of a JPEG, PNG or WebP"),
        ({"image": {"data": "data:image/svg+xml;base64,AAAA"}}, "it must be a data URL of a JPEG, PNG or WebP"),
    ],
)
def test_what_is_no_explanation_gets_a_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Florence2Error, match=re.escape(sentence)):
        render_page({"format": 1, **change})


def test_a_file_name_that_is_not_unicode_can_be_written(caption: dict[str, Any]) -> None:
    page = render_page({**caption, "model": {**caption["model"], "name": "mod\udcffel"}})
    assert "mod\\udcffel" in page.encode().decode()
    assert blocks(page)[0]["model"]["name"] == "mod\udcffel"


def test_without_saliency(caption: dict[str, Any]) -> None:
    without = {**caption, "tokens": [{**token, "saliency": None} for token in caption["tokens"]]}
    data, maps = blocks(render_page(without))
    assert data["tokens"][4]["saliency"] is None and len(maps) == 31 * data["packing"]["stride"]
