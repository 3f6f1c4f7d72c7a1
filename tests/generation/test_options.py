"""The settings of a generation: their defaults, a checkpoint's own, and what is refused."""

import json
import math
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions


def test_defaults_are_the_published_settings() -> None:
    published = {
        "num_beams": 3,
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
    }
    assert GenerationOptions() == GenerationOptions.from_settings(published)


def test_what_a_checkpoint_leaves_out_is_off() -> None:
    options = GenerationOptions.from_settings({})
    assert (options.num_beams, options.no_repeat_ngram_size, options.early_stopping) == (1, 0, False)
    assert options.forced_bos_token_id is None and options.forced_eos_token_id is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2.0}, "num_beams is 2.0"),
        ({"num_beams": True}, "num_beams is True"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"early_stopping": "maybe"}, "early_stopping"),
        ({"length_penalty": "1"}, "length_penalty"),
        ({"repetition_penalty": 0.0}, "above 0"),
        ({"num_return_sequences": 4}, "more than num_beams 3"),
        ({"forced_bos_token_id": -1}, "forced_bos_token_id"),
        ({"beams": 3}, "Unknown generation settings: beams. Known ones: num_beams"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        GenerationOptions().changed(**changes)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor, IntEnum("Few", {"TWO": 2})])
def test_whole_numbers_of_any_library(kind: Any) -> None:
    options = GenerationOptions(num_beams=kind(2), seed=None, max_new_tokens=kind(2))
    assert options == GenerationOptions(num_beams=2, max_new_tokens=2)
    assert type(options.num_beams) is int and json.loads(json.dumps(options.to_dict()))["num_beams"] == 2


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, torch.tensor, Fraction])
def test_other_numbers_of_any_library(kind: Any) -> None:
    drawn = GenerationOptions().changed(sample=np.bool_(True), temperature=kind(0.5), top_p=kind(0.5), seed=np.int32(3))
    assert drawn == GenerationOptions().changed(sample=True, temperature=0.5, top_p=0.5, seed=3)
    assert type(drawn.temperature) is float and drawn.sample is True
    stopping = GenerationOptions(early_stopping=torch.tensor(False), length_penalty=np.int64(2))  # type: ignore[arg-type]
    assert stopping.early_stopping is False and stopping.length_penalty == 2


@pytest.mark.parametrize(
    "value",
    [
        *(np.float64(2.0), np.bool_(True), torch.tensor(2.0), torch.tensor(True), torch.tensor(2, device="meta")),
        *(np.array([2]), torch.tensor([2]), np.array([2, 3]), "2", b"2", [2], Fraction(2, 3), 2j, np.str_("2"), int),
    ],
)
def test_what_is_not_a_whole_number(value: Any) -> None:
    with pytest.raises(OptionError, match=r"num_beams is .*; it must be a whole number of at least 1"):
        GenerationOptions(num_beams=value)


@pytest.mark.parametrize(
    "changes",
    [
        {"early_stopping": 1},
        {"length_penalty": math.nan},
        {"length_penalty": 1e300},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": math.inf},
    ],
)
def test_values_that_only_look_right_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(changes))):
        GenerationOptions(**changes)
    with pytest.raises(OptionError):
        GenerationOptions.from_settings(changes)


def test_unknown_settings_of_a_checkpoint_are_refused() -> None:
    with pytest.raises(OptionError, match="Unknown generation settings: beams"):
        GenerationOptions.from_settings({"beams": 3})
