"""The loop: it learns, resumes to the bit, and does not depend on how a batch is cut."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from florence2.errors import ConfigError
from florence2.train.nano import SceneSamples, make_model
from florence2.train.places import SceneSample
from florence2.train.settings import TrainSettings
from florence2.train.trainer import make_optimizer, train

SETTINGS = TrainSettings(
    steps=6, batch=4, learning_rate=1e-3, warmup=2, save_every=2, log_every=1, workers=0, seed=5, freeze=()
)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Breaking(SceneSamples):
    """Stops the run when sample after sample has been read."""

    def __init__(self, seed: int, count: int, after: int):
        super().__init__(seed, count)
        self.left = after

    def __getitem__(self, index: int) -> SceneSample:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_it_learns(mini, processor, tmp_path) -> None:
    settings = replace(SETTINGS, steps=40, learning_rate=3e-3, save_every=100)
    train(mini, processor, SceneSamples(1, 8), settings, tmp_path)
    log = rows(tmp_path)
    assert log[0]["loss"] > 5 and log[-1]["loss"] < 0.75 * log[0]["loss"]
    assert not mini.training


def test_a_broken_run_comes_to_the_same_bits(mini, mini_config, processor, tmp_path) -> None:
    """With dropout on, and in another order of events: stopped in update 5 after the state of update 4."""
    train(mini, processor, SceneSamples(1, 10), SETTINGS, tmp_path / "whole")
    broken = make_model(mini_config, processor, seed=3)
    with pytest.raises(KeyboardInterrupt):
        train(broken, processor, Breaking(1, 10, 19), SETTINGS, tmp_path / "broken")
    again = make_model(mini_config, processor, seed=99)  # what it begins with does not matter
    again.load_state_dict(make_model(mini_config, processor, seed=3).state_dict())
    train(again, processor, SceneSamples(1, 10), SETTINGS, tmp_path / "broken")
    for name, value in weights(mini).items():
        assert torch.equal(value, again.state_dict()[name]), name
    untimed = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows(tmp_path / run)]
        for run in ("whole", "broken")
    ]
    assert untimed[0] == untimed[1] and len(untimed[0]) == 6


def test_a_finished_run_is_left_alone(mini, mini_config, processor, tmp_path) -> None:
    train(mini, processor, SceneSamples(1, 10), SETTINGS, tmp_path)
    again = make_model(mini_config, processor, seed=3)
    train(again, processor, Breaking(1, 10, 0), SETTINGS, tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights(mini).items())


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_add_up(mini, mini_config, processor, tmp_path, size) -> None:
    """Answers of a batch differ in length, so that a mean of means would not do. Without dropout."""
    plain = replace(
        mini_config,
        vision=replace(mini_config.vision, drop_path_rate=0.0),
        text=replace(mini_config.text, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0),
    )
    models = [make_model(plain, processor, seed=3) for _ in range(2)]
    for model, micro in zip(models, (None, size), strict=True):
        settings = replace(SETTINGS, micro_batch=micro, steps=3)
        train(model, processor, SceneSamples(1, 12), settings, tmp_path / str(micro))
    one, cut = (rows(tmp_path / name) for name in ("None", str(size)))
    assert [row["loss"] for row in cut] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["norm"] for row in cut] == pytest.approx([row["norm"] for row in one], rel=1e-4)


def test_two_processes_come_to_the_weights_of_one(processor_folder, tmp_path) -> None:
    """The same global batch, shared by two processes, as torch's launcher starts them."""
    script = Path(__file__).with_name("shared_run.py")
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run(
            [*command, str(script), str(processor_folder), str(tmp_path / str(processes))],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert sorted(done.stdout.split()) == [f"{rank}/{processes}" for rank in range(processes)]
    one, two = (torch.load(tmp_path / str(n) / "state.pt", weights_only=True) for n in (1, 2))
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, rtol=1e-4, atol=2e-5)
    losses = [[row["loss"] for row in rows(tmp_path / str(n))] for n in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_other_settings_are_refused(mini, processor, tmp_path) -> None:
    train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, steps=1), tmp_path)
    with pytest.raises(ConfigError, match=r"begun with .*batch 4, not 2"):
        train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, steps=1, batch=2), tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(mini, processor, tmp_path) -> None:
    with torch.no_grad():
        mini.language_model.decoder.layers[0].fc1.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="lower --learning-rate"):
        train(mini, processor, SceneSamples(1, 8), SETTINGS, tmp_path)
    assert not (tmp_path / "state.pt").exists()


def test_only_matrices_decay(mini) -> None:
    optimizer = make_optimizer(mini, SETTINGS)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    spared = {name for name, p in mini.named_parameters() if id(p) not in decayed}
    assert "language_model.shared.weight" in spared
    assert all("norm" in n or "bias" in n or "embed" in n or "shared" in n for n in spared)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(mini.parameters()))
