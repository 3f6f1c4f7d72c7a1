"""The learning rate's line up and cosine down."""

import pytest

from florence2.errors import ConfigError
from florence2.train.schedule import rate_at
from florence2.train.settings import TrainSettings

SETTINGS = TrainSettings(steps=110, warmup=10, learning_rate=2.0)


def test_up_and_down() -> None:
    rates = [rate_at(step, SETTINGS) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0) and rates[110] == pytest.approx(0.0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_no_warmup() -> None:
    assert rate_at(0, TrainSettings(steps=10, warmup=0, learning_rate=1.0)) == 1.0


def test_impossible_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"steps is 0.*batch is -1.*learning_rate is 0"):
        TrainSettings(steps=0, batch=-1, learning_rate=0.0)
    with pytest.raises(ConfigError, match="precision"):
        TrainSettings(precision="float8")
