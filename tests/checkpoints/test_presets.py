"""Presets that no published file pins (those are in test_config)."""

import pytest

from florence2.checkpoints.config_files import read_config
from florence2.checkpoints.presets import preset
from florence2.errors import ConfigError
from parity.recipe import GOLDEN


def test_tiny_is_the_recorded_checkpoint() -> None:
    assert preset("tiny") == read_config(GOLDEN / "tiny")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="tiny, base, large"):
        preset("huge")
