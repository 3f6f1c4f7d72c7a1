"""Presets that no published file pins (those are in test_config)."""

from pathlib import Path

import pytest

from florence2.checkpoints.config_files import read_config
from florence2.checkpoints.presets import init_checkpoint, preset
from florence2.errors import ConfigError, OptionError
from parity.recipe import GOLDEN


def test_tiny_is_the_recorded_checkpoint() -> None:
    assert preset("tiny") == read_config(GOLDEN / "tiny")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="tiny, base, large"):
        preset("huge")


@pytest.mark.parametrize("seed", [-1, 1 << 63, 10**400])
def test_a_seed_out_of_range_is_refused_before_anything_is_written(tmp_path: Path, seed: int) -> None:
    with pytest.raises(OptionError, match=r"seed is .*; it must be a whole number from 0 to 2\*\*63 - 1"):
        init_checkpoint(tmp_path / "new", preset("tiny"), tmp_path, seed)
    assert not (tmp_path / "new").exists()
