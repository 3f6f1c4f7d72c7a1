"""config.json of both layouts -> Florence2Config, and back."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from florence2.checkpoints.config_files import GENERATION_SETTINGS, config_to_json, parse_config, read_config
from florence2.checkpoints.presets import preset
from florence2.errors import ConfigError
from florence2.generation.options import NOT_IN_CHECKPOINTS, GenerationOptions
from florence2.model.attention import ACTIVATIONS
from florence2.model.config import ACTIVATION_NAMES, STAGE_TUPLES, Florence2Config, change_config, find_problems
from florence2.model.davit import DaViT
from parity.cases import shapes
from parity.recipe import GOLDEN

PUBLISHED = json.loads((GOLDEN / "configs.json").read_text())


def published(name: str = "base") -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(PUBLISHED[name]))
    return copy


@pytest.mark.parametrize("name", ["base", "large"])
def test_presets_are_the_published_files(name: str) -> None:
    assert parse_config(published(name)) == preset(name)


def test_published_values() -> None:
    large = parse_config(published("large"))
    assert (large.vision.dim_embed, large.vision.depths) == ((256, 512, 1024, 2048), (1, 1, 9, 1))
    assert large.text.max_position_embeddings == 4096
    assert large.generation == {
        "num_beams": 3,
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
    }


@pytest.mark.parametrize("layout", ["microsoft", "native"])
def test_writing_and_reading_again(layout: Any) -> None:
    for config in [preset("base"), preset("large"), *(shape.config for shape in shapes()[:4])]:
        values, generation = config_to_json(config, layout, "float16")
        again = parse_config(json.loads(json.dumps(values)), json.loads(json.dumps(generation)))
        assert again == replace(config, layout=layout)


def test_microsoft_ignores_generation_config_and_native_uses_it() -> None:
    config = parse_config(published(), {"num_beams": 7, "do_sample": True})
    assert config.generation["num_beams"] == 3
    values, _ = config_to_json(config, "native", "float16")
    native = parse_config(values, {"num_beams": 7, "early_stopping": None, "top_k": 50})
    assert native.generation == {"num_beams": 7}


def test_what_transformers_writes_beside_the_architecture_is_accepted() -> None:
    values = published()
    noise = {"return_dict": True, "torchscript": False, "id2label": {"0": "x"}, "bad_words_ids": None, "top_k": 50}
    values["text_config"] |= noise
    values["vision_config"] |= noise
    values |= {**noise, "_name_or_path": "somewhere", "tie_word_embeddings": True}
    assert parse_config(values) == preset("base")


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("vision_config", {"shifted_windows": True}, "vision_config.shifted_windows is an unknown field"),
        ("text_config", {"rotary": 1}, "text_config.rotary is an unknown field"),
        (None, {"experts": 4}, "config.experts is an unknown field"),
        ("text_config", {"activation_function": "mish"}, "is 'mish'; it must be one of gelu, gelu_new, .*, silu"),
        ("text_config", {"activation_function": None}, "activation_function must be str"),
        ("vision_config", {"activation_function": "silu"}, "only 'gelu' is implemented"),
        ("text_config", {"normalize_before": True}, "only False is implemented"),
        ("text_config", {"add_final_layer_norm": True}, "add_final_layer_norm"),
        ("text_config", {"do_sample": True}, "do_sample"),
        ("text_config", {"num_beam_groups": 2}, "num_beam_groups"),
        ("vision_config", {"model_type": "swin"}, "not 'davit'"),
        (None, {"model_type": "llava"}, "not a Florence-2 checkpoint"),
        ("vision_config", {"image_pos_embed": {"type": "rope", "max_pos_embeddings": 50}}, "learned_abs_2d"),
        ("vision_config", {"image_feature_source": ["cls"]}, "image_feature_source"),
        ("vision_config", {"image_feature_source": []}, "image_feature_source"),
        ("vision_config", {"depths": [1, 1, 9]}, "depths has 3 entries for 4 stages"),
        ("vision_config", {"num_heads": [3, 8, 16, 32]}, "not divisible by num_heads"),
        ("vision_config", {"num_groups": [4, 7, 16, 32]}, "not divisible by num_groups"),
        ("vision_config", {"dim_embed": [128, "256", 512, 1024]}, "list of int"),
        ("vision_config", {"depths": [1, 1, 900, 1]}, "the limit is 512"),
        ("vision_config", {"window_size": 0}, "window_size is 0"),
        ("vision_config", {"projection_dim": 700}, "projection_dim 700 is not text_config.d_model 768"),
        ("text_config", {"encoder_attention_heads": 7}, "not divisible by 7"),
        ("text_config", {"decoder_layers": 10_000}, "1 to 512"),
        ("text_config", {"pad_token_id": 60_000}, "outside the vocabulary"),
        ("text_config", {"d_model": "768"}, "must be int"),
    ],
)
def test_what_would_run_another_model_is_refused_by_name(part: str | None, changes: dict[str, Any], words: str) -> None:
    values = published()
    (values[part] if part else values).update(changes)
    with pytest.raises(ConfigError, match=words):
        parse_config(values)


@pytest.mark.parametrize("key", ["dim_embed", "window_size", "image_pos_embed", "image_feature_source"])
def test_no_architectural_default(key: str) -> None:
    values = published()
    del values["vision_config"][key]
    with pytest.raises(ConfigError, match=f"lacks '{key}'"):
        parse_config(values)


def test_all_problems_at_once() -> None:
    values = published()
    values["vision_config"]["new"] = 1
    del values["text_config"]["d_model"]
    with pytest.raises(ConfigError) as error:
        parse_config(values)
    assert "vision_config.new" in str(error.value) and "lacks 'd_model'" in str(error.value)


def test_the_native_layout_has_no_other_pooling() -> None:
    base = preset("base")
    config: Florence2Config = replace(base, vision=replace(base.vision, image_feature_source=("last_frame",)))
    with pytest.raises(ConfigError, match="no place in the native layout"):
        config_to_json(config, "native", "float16")
    with pytest.raises(ConfigError, match="no place in Microsoft's layout"):
        config_to_json(replace(base, vision=replace(base.vision, mlp_ratio=2.0)), "microsoft", "float16")


def test_activations_have_a_place_in_the_layouts() -> None:
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES
    silu = change_config(preset("base"), {"text.activation_function": "silu"})
    for layout in ("microsoft", "native"):
        values, generation = config_to_json(silu, layout, "float16")
        assert values["text_config"]["activation_function"] == "silu"
        assert parse_config(values, generation) == replace(silu, layout=layout)
    relu = change_config(preset("base"), {"vision.activation_function": "relu"})
    values, generation = config_to_json(relu, "native", "float16")
    assert parse_config(values, generation) == replace(relu, layout="native")
    with pytest.raises(ConfigError, match=r"activation_function other than gelu has no place in Microsoft's layout"):
        config_to_json(relu, "microsoft", "float16")


def test_a_change_is_as_if_the_file_had_said_it() -> None:
    changes = {
        "vision.window_size": 8,
        "vision.depths": [1, 1, 8, 1],
        "text.dropout": 0,
        "generation.num_beams": 1,
        "generation.max_new_tokens": 7,
        "generation.early_stopping": None,
    }
    values = published()
    values["vision_config"] |= {"window_size": 8, "depths": [1, 1, 8, 1]}
    values["text_config"] |= {"dropout": 0, "num_beams": 1, "max_new_tokens": 7, "early_stopping": None}
    before = preset("base")
    assert change_config(before, changes) == parse_config(values)
    arrays = {
        "vision.window_size": np.int64(8),
        "vision.depths": list(np.array([1, 1, 8, 1])),
        "text.dropout": np.float32(0),
    }
    changed = change_config(before, {**changes, **arrays, "generation.num_beams": torch.tensor(1)})
    assert changed == parse_config(values) and json.dumps(config_to_json(changed, "microsoft", "float16"))
    assert before == preset("base") and change_config(before, {}) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision.windowsize": 8}, "'vision.windowsize' is an unknown setting; the nearest is vision.window_size"),
        ({"window_size": 8}, "the nearest is vision.window_size"),
        ({"generation.beams": 8}, "the nearest is generation.num_beams"),
        ({"layout": "native"}, "'layout' is an unknown setting; names begin with vision., text. or generation."),
        ({3: 8}, "'3' is an unknown setting"),
        ({"vision.window_size": "8"}, "vision.window_size must be int, not '8'"),
        ({"vision.window_size": 8.0}, "vision.window_size must be int, not 8.0"),
        ({"vision.window_size": True}, "vision.window_size must be int, not True"),
        ({"vision.window_size": 300}, "vision_config.window_size is 300; it must be 1 to 64"),
        ({"vision.depths": 3}, "vision.depths must be a list of int, not 3"),
        ({"vision.depths": [1, "2"]}, "vision.depths must be a list of int"),
        ({"vision.depths": [1, 2]}, "depths has 2 entries for 4 stages"),
        ({"text.dropout": "much"}, "text.dropout must be float"),
        ({"text.dropout": -0.5}, "text.dropout must be a number from 0 to"),
        ({"text.dropout": 10**400}, "text.dropout must be float, not 1000"),
        ({"text.dropout": float("nan")}, "text.dropout must be a number from 0 to"),
        ({"vision.window_size": 10**400}, "vision.window_size must be a number from 0 to"),
        ({"vision.image_feature_source": ["last_frame"] * 15_000}, "it must name 1 to 8 of"),
        ({"vision.depths": [0] * 15_000}, "entries for 4 stages.*and 14,99. more"),
        ({"text.scale_embedding": 1}, "text.scale_embedding must be bool"),
        ({"text.activation_function": "mish"}, "activation_function is 'mish'; it must be one of gelu, "),
        ({"text.encoder_attention_heads": 7}, "not divisible by 7 encoder_attention_heads"),
        ({"text.dropout": None, "vision.nothing": 1}, "(?s)vision.nothing.*text.dropout must be float"),
        ([("vision.window_size", 8)], "give names and values, such as"),
    ],
)
def test_a_change_is_checked_as_the_file_is(changes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        change_config(preset("base"), changes)


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json: config lacks 'vision_config'"):
        read_config(tmp_path)


def test_the_settings_are_those_of_the_search() -> None:
    """All but those of a call alone, which no checkpoint states."""
    assert {*GENERATION_SETTINGS, *NOT_IN_CHECKPOINTS} == {field.name for field in fields(GenerationOptions)}
    assert not {*GENERATION_SETTINGS} & {*NOT_IN_CHECKPOINTS}


def test_grid_size_is_what_the_tower_gives() -> None:
    assert preset("base").vision.grid_size(768, 512) == (24, 16)
    vision = replace(preset("tiny").vision, patch_size=(5, 3, 2, 3), patch_padding=(0, 1, 0, 1))
    with torch.no_grad():
        grid = DaViT(vision)(torch.zeros(1, 3, 161, 97))
    assert vision.grid_size(161, 97) == tuple(grid.shape[1:3])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_temporal_embeddings", 10**13),
        ("window_size", 10**9),
        ("projection_dim", 0),
        ("patch_padding", [3, -1, 1, 1]),
        ("patch_padding", [10**9, 1, 1, 1]),
        ("depths", [1, 10**20, 1, 1]),
    ],
)
def test_hostile_sizes_are_refused_before_anything_is_built(key: str, value: Any) -> None:
    values, _ = config_to_json(preset("tiny"), "microsoft", "float32")
    section = values["vision_config"]
    target = section["visual_temporal_embedding"] if key == "max_temporal_embeddings" else section
    target[key] = value
    with pytest.raises(ConfigError, match=f"{key} is"):
        parse_config(values)


@pytest.mark.parametrize(
    ("key", "accepted", "refused"),
    [
        ("vision.window_size", (1, 64), (0, 65)),
        ("vision.max_position_embeddings", (1, 1 << 20), (0, (1 << 20) + 1)),
        ("vision.max_temporal_embeddings", (1, 4096), (0, 4097)),
        ("vision.projection_dim", (1, 1 << 20), (0, (1 << 20) + 1)),
        ("vision.patch_size", (1, 256), (0, 257)),
        ("vision.patch_stride", (1, 256), (0, 257)),
        ("vision.patch_padding", (0, 256), (-1, 257)),
        ("vision.dim_embed", (1, 1 << 14), (0, (1 << 14) + 1)),
        ("vision.num_heads", (1, 1 << 20), (0, (1 << 20) + 1)),
        ("vision.mlp_ratio", (0.1, 512.0), (0.0, 512.1)),
        ("vision.drop_path_rate", (0.0, 0.9), (-0.1, 1.0)),
        ("text.vocab_size", (1, 1 << 20), (0, (1 << 20) + 1)),
        ("text.d_model", (1, 1 << 20), (0, (1 << 20) + 1)),
        ("text.encoder_ffn_dim", (1,), (0,)),
        ("text.decoder_ffn_dim", (1,), (0,)),
        ("text.max_position_embeddings", (1,), (0,)),
        ("text.encoder_layers", (1, 512), (0, 513)),
        ("text.decoder_layers", (1, 512), (0, 513)),
        *((f"text.{key}", (0.0, 1.0), (-0.1, 1.1)) for key in ("dropout", "attention_dropout", "activation_dropout")),
        ("text.pad_token_id", (0, 499), (500,)),
        ("text.decoder_start_token_id", (0, 499), (500,)),
    ],
)
def test_every_size_has_its_limits(key: str, accepted: tuple[Any, ...], refused: tuple[Any, ...]) -> None:
    config = preset("tiny")
    config = replace(config, text=replace(config.text, vocab_size=500))
    part, _, name = key.partition(".")
    section = getattr(config, part)
    for value in (*accepted, *refused):
        old = getattr(section, name)
        changed = replace(section, **{name: (value, *old[1:]) if isinstance(old, tuple) else value})
        problems = find_problems(**{"vision": config.vision, "text": config.text, part: changed})
        complaint = rf"{part}_config\.{name} (is )?{value}[; ]"
        ours = [problem for problem in problems if re.match(complaint, problem) and "divisible" not in problem]
        assert bool(ours and "is not text" not in ours[0]) == (value in refused), (value, problems)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_heads_share_the_width(side: str) -> None:
    config = preset("base")
    for heads, fits in ((0, False), (-1, False), (1, True), (768, True), (769, False), (7, False)):
        problems = find_problems(config.vision, replace(config.text, **{f"{side}_attention_heads": heads}))
        words = [f"text_config.d_model 768 is not divisible by {heads} {side}_attention_heads"]
        assert problems == words * (not fits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depths": (510, 1, 1, 1)}, "ask for 513 blocks"),
        ({"depths": (509, 1, 1, 1)}, None),
        ({"image_feature_source": ("last_frame",) * 9}, "must name 1 to 8"),
        ({"image_feature_source": ("last_frame",) * 8}, None),
        ({"image_feature_source": ("last_frame",)}, None),
        ({"dim_embed": (128, 256, 512, 1024)}, None),
        ({"dim_embed": (128, 256, 512, 1023), "num_heads": (1,) * 4, "num_groups": (1,) * 4}, "that must be even"),
    ],
)
def test_sizes_that_limit_each_other(changes: dict[str, Any], words: str | None) -> None:
    config = preset("base")
    problems = find_problems(replace(config.vision, **changes), config.text)
    assert len(problems) == (words is not None) and (words or "") in "".join(problems)
    stages = dict.fromkeys(STAGE_TUPLES, (1,) * 8) | {"patch_prenorm": (True,) * 8, "dim_embed": (2,) * 8}
    assert find_problems(replace(config.vision, **stages), config.text) == []
    stages = {key: (*values, values[0]) for key, values in stages.items()}
    assert len(find_problems(replace(config.vision, **stages), config.text)) == len(stages)
