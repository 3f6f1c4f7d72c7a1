"""Tensor names: every published key, both layouts, both directions."""

from collections import Counter
from typing import Any

import pytest
import torch

from florence2.checkpoints.layouts import (
    _FROM_CANONICAL,
    _TO_CANONICAL,
    SHARED,
    TIED_TO_SHARED,
    TRANSPOSED,
    detect_layout,
    from_canonical,
    to_canonical,
)
from florence2.checkpoints.presets import preset
from florence2.model.config import Layout
from florence2.model.florence2 import Florence2Model
from parity.records import read_record

LISTS: list[tuple[str, Layout, str]] = [
    ("base-microsoft", "microsoft", "base"),
    ("large-microsoft", "microsoft", "large"),
    ("base-native", "native", "base"),
]


def model_shapes(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Florence2Model(preset(name))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("record", "layout", "size"), LISTS)
def test_published_names_become_ours_with_our_shapes(record: str, layout: Layout, size: str) -> None:
    published: dict[str, Any] = read_record("state_dicts.json")[record]
    expected = model_shapes(size)
    seen: Counter[str] = Counter()
    for name, shape in published.items():
        canonical = to_canonical(name, layout)
        assert canonical is not None, name
        target = SHARED if canonical in TIED_TO_SHARED else canonical
        seen[target] += 1
        stored = tuple(shape)[::-1] if canonical in TRANSPOSED[layout] else tuple(shape)
        assert stored == expected[target], name
    missing = set(expected) - set(seen)
    assert missing == ({"final_logits_bias"} if layout == "native" else set())
    assert {name: n for name, n in seen.items() if n > 1} == {SHARED: 4}


@pytest.mark.parametrize(("record", "layout", "size"), LISTS)
def test_there_and_back(record: str, layout: Layout, size: str) -> None:
    published: dict[str, Any] = read_record("state_dicts.json")[record]
    assert {name: from_canonical(to_canonical(name, layout) or "", layout) for name in published} == {
        n: n for n in published
    }
    canonical = model_shapes(size)
    back = {
        name: to_canonical(from_canonical(name, layout) or "", layout)
        for name in canonical
        if name != "final_logits_bias"
    }
    assert back == {name: name for name in back}


@pytest.mark.parametrize(("record", "layout", "size"), LISTS)
def test_every_key_matches_exactly_one_rule(record: str, layout: Layout, size: str) -> None:
    for name in read_record("state_dicts.json")[record]:
        assert sum(bool(pattern.fullmatch(name)) for pattern, _ in _TO_CANONICAL[layout]) == 1, name
    for name in model_shapes(size):
        matches = sum(bool(pattern.fullmatch(name)) for pattern, _ in _FROM_CANONICAL[layout])
        assert matches == (0 if (layout, name) == ("native", "final_logits_bias") else 1), name


def test_adapters_follow_the_same_rules() -> None:
    name = "vision_tower.blocks.2.4.spatial_block.window_attn.fn.qkv.lora_A.weight"
    assert to_canonical(name, "microsoft") == "vision_tower.blocks.2.4.spatial_block.window_attn.qkv.lora_A.weight"
    assert (
        from_canonical("language_model.decoder.layers.0.fc1.lora_B.weight", "native")
        == "model.language_model.decoder.layers.0.fc1.lora_B.weight"
    )


@pytest.mark.parametrize(
    "name", ["vision_tower.norms.weight", "x.image_projection", "image_projection.bias", "lm_head", ""]
)
def test_unknown_names_are_unknown(name: str) -> None:
    assert to_canonical(name, "microsoft") is None


def test_the_layout_is_told_by_a_named_key() -> None:
    lists = read_record("state_dicts.json")
    assert detect_layout(lists["base-microsoft"]) == "microsoft"
    assert detect_layout(lists["base-native"]) == "native"
    assert detect_layout(["model.weight"]) is None
