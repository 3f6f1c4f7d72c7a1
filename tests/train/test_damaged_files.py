"""A run's own files, damaged by an editor, a disk or a copy: each is one sentence with the remedy."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from florence2.errors import CheckpointError, ConfigError, Florence2Error
from florence2.train.checkpoints import load_state
from florence2.train.plot import plot_log
from florence2.train.run_log import read_log
from florence2.train.settings import TrainSettings
from florence2.train.trainer import train
from recipes.nano.train import SceneSamples, make_model
from tests.full_disk import files_of_at_most

SETTINGS = TrainSettings(
    steps=2, batch=2, learning_rate=1e-3, warmup=1, save_every=1, log_every=1, workers=0, seed=5, freeze=()
)


@pytest.fixture(scope="module")
def two_steps(mini_config: Any, processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps. Do not write to it."""
    folder = tmp_path_factory.mktemp("two") / "run"
    train(make_model(mini_config, processor, seed=3), processor, SceneSamples(1, 4), SETTINGS, folder)
    return folder


@pytest.fixture
def finished(two_steps: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def resume(folder: Path, mini_config, processor) -> None:
    train(make_model(mini_config, processor, seed=3), processor, SceneSamples(1, 4), SETTINGS, folder)


LINES = [
    b"not json",
    b"\xff\xfe",
    b"[1]",
    b'{"loss": 1.0}',
    b'{"step": "1", "loss": 1.0}',
    b'{"step": 1, "loss": "low", "learning_rate": 1}',
    b'{"step": 1, "loss": 1.0}',
    b'{"step": 1, "loss": NaN, "learning_rate": 1}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b'{"step": ' + b"[" * 100_000,
    b"9" * 5000,
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_damaged_log_names_the_line_and_the_remedy(line: bytes, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1, "loss": 1.0, "learning_rate": 0.1}\n' + line + b"\n")
    for use in (read_log, lambda path: plot_log(path, tmp_path / "curve.png")):
        with pytest.raises(ConfigError, match=r"Line 2 of .*log\.jsonl is damaged.*Remove the line"):
            use(log)
    assert not (tmp_path / "curve.png").exists()


def test_a_damaged_log_stops_a_resumed_run_before_it_trains(finished, mini_config, processor) -> None:
    log = finished / "log.jsonl"
    log.write_bytes(b"\xff\n" + log.read_bytes())
    with pytest.raises(ConfigError, match="Line 1 of"):
        resume(finished, mini_config, processor)
    log.unlink()
    resume(finished, mini_config, processor)


def spoil(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(folder / "state.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "state.pt")


@pytest.mark.parametrize("step", [1.5, -1, float("nan"), "1", None, True])
def test_a_step_that_is_none_is_refused(step: object, tmp_path: Path) -> None:
    torch.save({"step": step, "parameters": {}, "optimizer": {}}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="not the state of a training run.*Remove it to start"):
        load_state(tmp_path)


@pytest.mark.parametrize("state", [[1], {"step": 1}, {"step": 1, "parameters": [], "optimizer": {}}])
def test_other_values_are_refused(state: object, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="not the state of a training run"):
        load_state(tmp_path)


def first(state: dict[str, dict[str, Any]]) -> str:
    return next(iter(state["parameters"]))


SPOILT: dict[str, Callable[[dict[str, Any]], object]] = {
    "a later step": lambda state: state.update(step=3),
    "an endless step": lambda state: state.update(step=2**60),
    "no optimizer": lambda state: state.update(optimizer={}),
    "groups of another kind": lambda state: state["optimizer"].update(param_groups=[1]),
    "other groups": lambda state: state["optimizer"]["param_groups"].pop(),
    "other settings": lambda state: state["optimizer"]["param_groups"][0].update(betas="ab"),
    "SGD": lambda state: state.update(
        optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1).state_dict()
    ),
    "moments of another shape": lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(3)),
    "moments that are not finite": lambda state: state["optimizer"]["state"][0]["exp_avg_sq"].fill_(float("nan")),
    "no moments": lambda state: state["optimizer"]["state"].update({0: {}}),
    "moments of nothing": lambda state: state["optimizer"]["state"].update({10_000: {}}),
    "a weight of another shape": lambda state: state["parameters"].update({first(state): torch.ones(3)}),
    "a weight that is a number": lambda state: state["parameters"].update({first(state): 1}),
    "a weight that is not finite": lambda state: state["parameters"][first(state)].fill_(float("nan")),
    "a weight more": lambda state: state["parameters"].update(more=torch.ones(1)),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_state_of_another_run_is_refused(case: str, finished, mini_config, processor) -> None:
    spoil(finished, SPOILT[case])
    with pytest.raises(Florence2Error, match=r"Use another folder|Remove it"):
        resume(finished, mini_config, processor)


def test_a_log_that_no_longer_fits_on_the_disk(mini, processor, tmp_path) -> None:
    """The state of the last save is whole; a longer log line is reported, not the file that cannot be closed."""
    settings = replace(SETTINGS, save_every=100)
    with files_of_at_most(20), pytest.raises(Florence2Error, match="cannot be written"):
        train(mini, processor, SceneSamples(1, 4), settings, tmp_path)


def test_rows_are_written_as_they_will_be_read(finished: Path) -> None:
    text = (finished / "log.jsonl").read_text()
    assert read_log(finished / "log.jsonl") == [json.loads(line) for line in text.splitlines()]
