"""The settings of a generation: their defaults, a checkpoint's own, and what is refused."""

import math
from typing import Any

import pytest

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
