"""The options that divide the work, as `florence2 label` and `florence2 evaluate` have them."""

import argparse
import os

import pytest

from florence2.label.options import MOST_WORKERS, add_work, check_work


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (4, 3), (64, MOST_WORKERS)])
def test_one_core_is_left_to_the_model(cores: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that this process may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    parser = argparse.ArgumentParser()
    add_work(parser, shard="a part")
    options = parser.parse_args([])
    check_work(options)
    assert options.workers == workers
