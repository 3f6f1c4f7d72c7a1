"""The loop: it learns, resumes to the bit, and does not depend on how a batch is cut."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from florence2.bulk.lock import LOCK_NAME, FolderLock
from florence2.errors import CheckpointError, ConfigError, ImageError, OptionError
from florence2.train.checkpoints import TrainState, load_state, restore_state, save_state
from florence2.train.loader import _start_worker
from florence2.train.loss import LossModule
from florence2.train.run_folder import check_same_step, lock_folder
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings
from florence2.train.trainer import make_optimizer, train
from recipes.nano.places import SceneSample
from recipes.nano.train import SceneSamples, make_model
from tests.release import keep
from tests.train import shared_run
from tests.train.disturbed import DisturbedSamples, interrupt, send

ROOT = Path(__file__).parents[2]
SETTINGS = TrainSettings(
    steps=6, batch=4, learning_rate=1e-3, warmup=2, save_every=2, log_every=1, workers=0, seed=5, freeze=()
)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns(mini, processor, tmp_path) -> None:
    settings = replace(SETTINGS, steps=40, learning_rate=3e-3, save_every=100)
    train(mini, processor, SceneSamples(1, 8), settings, tmp_path)
    log = rows(tmp_path)
    assert log[0]["loss"] > 5 and log[-1]["loss"] < 0.75 * log[0]["loss"]
    assert not mini.training


@pytest.mark.release
def test_a_broken_run_comes_to_the_same_bits(mini, mini_config, processor, tmp_path) -> None:
    """With dropout on, and in another order of events: stopped in update 5 after the state of update 4."""
    train(mini, processor, SceneSamples(1, 10), SETTINGS, tmp_path / "whole")
    broken = make_model(mini_config, processor, seed=3)
    with pytest.raises(KeyboardInterrupt):
        train(broken, processor, DisturbedSamples(1, 10, 20, interrupt), SETTINGS, tmp_path / "broken")
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
    train(again, processor, DisturbedSamples(1, 10, 1, interrupt), SETTINGS, tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights(mini).items())


@pytest.mark.parametrize("size", keep([1], [1, 3]))
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


@pytest.mark.release  # torch's launcher and two processes
def test_two_processes_come_to_the_weights_of_one(processor_folder, tmp_path, capfd) -> None:
    """The same global batch, by this process, and shared by two as torch's launcher starts them.

    They stop on the way, because one of them gets a signal, and then resume.
    """
    shared_run.run(processor_folder, tmp_path / "1")
    assert capfd.readouterr().out.split() == ["0/1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, shared_run.__file__, str(processor_folder), str(tmp_path / "2")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes share each batch." in done.stderr
    assert sorted(done.stdout.split()) == ["0/2", "0/2:1", "1/2", "1/2:1"]  # both after update 1
    one, two = (torch.load(tmp_path / str(n) / "state.pt", weights_only=True) for n in (1, 2))
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, rtol=1e-4, atol=2e-5)
    losses = [[row["loss"] for row in rows(tmp_path / str(n))] for n in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_other_settings_are_refused(mini, processor, tmp_path) -> None:
    train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, steps=1), tmp_path)
    with pytest.raises(ConfigError, match=r"other settings \(batch was 4 and is 2\)"):
        train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, steps=1, batch=2), tmp_path)


def test_what_changes_no_weight_may_be_changed(mini, processor, tmp_path) -> None:
    train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, steps=1), tmp_path)
    free = replace(SETTINGS, steps=1, save_every=9, log_every=9, workers=2)
    train(mini, processor, SceneSamples(1, 8), free, tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["save_every"] == 9


def test_a_run_that_saved_nothing_holds_nobody(mini, processor, tmp_path) -> None:
    """Its folder is free for other settings."""
    with pytest.raises(KeyboardInterrupt):
        train(mini, processor, DisturbedSamples(1, 8, 7, interrupt), SETTINGS, tmp_path)
    assert rows(tmp_path) and not (tmp_path / "state.pt").exists()
    train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, batch=2, steps=1), tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["batch"] == 2 and len(rows(tmp_path)) == 1


def test_runs_of_one_process_may_differ_in_precision(mini, mini_config, processor, tmp_path) -> None:
    """The second is autocast, and its weights stay float32."""
    other = make_model(mini_config, processor, seed=3)
    settings = replace(SETTINGS, steps=1)
    train(mini, processor, SceneSamples(1, 8), settings, tmp_path / "float32")
    train(other, processor, SceneSamples(1, 8), replace(settings, precision="bfloat16"), tmp_path / "bfloat16")
    (one,), (two,) = (rows(tmp_path / name) for name in ("float32", "bfloat16"))
    assert two["loss"] != one["loss"] and two["loss"] == pytest.approx(one["loss"], rel=1e-2)
    assert {p.dtype for p in other.parameters()} == {torch.float32}


def test_half_a_row_of_the_log_is_dropped(mini, processor, tmp_path) -> None:
    """As a kill leaves one; it may end with a brace all the same."""
    train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, steps=1), tmp_path)
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(whole + '{"step": 1, "evaluation": {"<OD>": {"count": 3}')
    train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, steps=1), tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == whole


def test_the_state_keeps_what_was_finite(mini, processor, tmp_path) -> None:
    """A third update whose gradient is NaN, with a log too rare to see it and a state that is saved at once."""

    class Poisoned(SceneSamples):
        def __getitem__(self, index: int) -> SceneSample:
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen > 8:
                with torch.no_grad():
                    mini.language_model.decoder.layers[0].fc1.bias[0] = float("nan")
            return super().__getitem__(index)

    settings = replace(SETTINGS, save_every=1, log_every=100)
    with pytest.raises(ConfigError, match="At step 3 the loss is nan .*lower --learning-rate"):
        train(mini, processor, Poisoned(1, 8), settings, tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 2 and all(torch.isfinite(value).all() for value in state["parameters"].values())


def test_what_a_worker_cannot_read_is_one_sentence(mini, processor, tmp_path) -> None:
    samples = [Sample(tmp_path / "gone.png", (("<CAPTION>", "x"),), "gone.png (line 4)")] * 4
    with pytest.raises(ImageError) as raised:
        train(mini, processor, samples, replace(SETTINGS, workers=1), tmp_path / "run")
    assert str(raised.value).startswith("gone.png (line 4): ") and "\n" not in str(raised.value)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "save_every"), keep([1], [(signal.SIGINT, 100), (signal.SIGTERM, 3)]))
def test_a_stopped_run_saves_its_state(mini, mini_config, processor, tmp_path, number, save_every) -> None:
    """The signal comes in update 3. An evaluation that is due then is skipped, and made up for later."""
    settings = replace(SETTINGS, save_every=save_every)
    train(mini, processor, SceneSamples(1, 10), settings, tmp_path / "whole")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    evaluated = []

    def evaluate(step: int) -> dict:
        evaluated.append(step)
        return {"evaluation": {}}

    stopped = make_model(mini_config, processor, seed=3)
    with pytest.raises(KeyboardInterrupt):
        train(
            stopped,
            processor,
            DisturbedSamples(1, 10, 9, send(number)),
            settings,
            tmp_path / "run",
            after_save=evaluate,
        )
    assert load_state(tmp_path / "run").step == 3 and not evaluated
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    for _ in range(2):  # the second finds all done
        again = make_model(mini_config, processor, seed=3)
        train(again, processor, SceneSamples(1, 10), settings, tmp_path / "run", after_save=evaluate)
        assert evaluated == ([3, 6] if save_every == 3 else [6])
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights(mini).items())


@pytest.mark.usefixtures("interruptible")
def test_an_evaluation_is_broken_off_at_once_and_made_up_for(mini, mini_config, processor, tmp_path) -> None:
    done: list[int] = []

    def evaluate(step: int) -> dict:
        if step == 2 and not done:
            os.kill(os.getpid(), signal.SIGINT)
        done.append(step)
        return {"evaluation": {}}

    with pytest.raises(KeyboardInterrupt):
        train(mini, processor, SceneSamples(1, 10), SETTINGS, tmp_path, after_save=evaluate)
    assert not done and load_state(tmp_path).step == 2
    done.append(0)
    train(
        make_model(mini_config, processor, seed=3), processor, SceneSamples(1, 10), SETTINGS, tmp_path, None, evaluate
    )
    assert done == [0, 2, 4, 6]


@pytest.mark.release  # a command and its worker, ended
def test_a_group_that_is_ended_saves_what_it_has(data, mini_folder, tmp_path) -> None:
    """As a launcher, `timeout` or a scheduler ends a command: SIGTERM to its worker processes as well."""
    words = f"train {data} --model {mini_folder} --out {tmp_path} --steps 10000 --batch 2 --log-every 1"
    process = subprocess.Popen(
        [sys.executable, "-m", "florence2", *words.split(), "--workers", "1", "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        for line in process.stderr:
            if line.startswith("step 3 "):
                os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 130
    assert load_state(tmp_path).step == rows(tmp_path)[-1]["step"] >= 3


def test_a_worker_leaves_stopping_to_the_main_process() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers, threads = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    try:
        _start_worker(0)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN, signal.SIG_IGN]
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        torch.set_num_threads(threads)


def test_a_full_disk_is_one_sentence_and_keeps_the_old_state(mini, processor, tmp_path, monkeypatch) -> None:
    train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, steps=2, save_every=1), tmp_path)
    old = (tmp_path / "state.pt").read_bytes()

    def full(values: object, path: Path) -> None:
        path.write_bytes(b"as far as it went")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 801856 vs 801744")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="step 7 cannot be written .*make room and .*the same command"):
        save_state(tmp_path, TrainState(7, {}, {}))
    assert (tmp_path / "state.pt").read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_NAME, "settings.json", "log.jsonl", "state.pt"}


def test_processes_that_found_different_states_do_not_start(tmp_path) -> None:
    class Two:
        device = torch.device("cpu")

        def gather(self, step: torch.Tensor) -> torch.Tensor:
            return torch.cat([step, torch.tensor([0])])

    check_same_step(0, tmp_path, Two())
    with pytest.raises(ConfigError, match=r"steps, \[4, 0\]: all machines must share"):
        check_same_step(4, tmp_path, Two())


def test_two_runs_do_not_mix_in_a_folder(mini, processor, tmp_path) -> None:
    settings = replace(SETTINGS, steps=1)
    train(mini, processor, SceneSamples(1, 8), settings, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with FolderLock(tmp_path), pytest.raises(OptionError, match="Another run is writing to"):
        train(mini, processor, SceneSamples(1, 8), settings, tmp_path)
    with pytest.raises(ConfigError, match="other settings"):
        train(mini, processor, SceneSamples(1, 8), replace(settings, batch=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    train(mini, processor, SceneSamples(1, 8), settings, tmp_path)


def test_no_process_starts_where_one_cannot_use_the_folder(tmp_path) -> None:
    """The first of them alone holds the lock; the others would wait for it for a day."""

    class Process:
        device = torch.device("cpu")

        def __init__(self, first: bool, failed: int):
            self.is_main_process, self.failed = first, failed

        def reduce(self, failed: torch.Tensor, reduction: str) -> torch.Tensor:
            return failed + self.failed

    for first in (False, True):
        with pytest.raises(OptionError, match="Another process of this run cannot use"):
            lock_folder(tmp_path / "run", Process(first, failed=1))
    with (
        lock_folder(tmp_path / "run", Process(True, failed=0)),
        lock_folder(tmp_path / "run", Process(False, failed=0)),
    ):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="file cannot be written: File exists. Choose another folder"):
        lock_folder(tmp_path / "file", Process(False, failed=0))


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


def test_fused_adamw_is_adamw_up_to_rounding(mini, mini_config, processor) -> None:
    """Ten updates with the same gradients by both."""
    other = make_model(mini_config, processor, seed=3)
    fused = make_optimizer(mini, SETTINGS)
    groups = make_optimizer(other, SETTINGS).param_groups
    plain = torch.optim.AdamW([{**group, "fused": False} for group in groups])
    assert fused.param_groups[0]["fused"] and not plain.param_groups[0]["fused"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for one, two in zip(mini.parameters(), other.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        fused.step()
        plain.step()
    for name, value in weights(mini).items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=2e-6, atol=1e-7)


def test_a_state_of_plain_adamw_is_resumed_by_the_fused_one(mini, processor, tmp_path) -> None:
    """As earlier versions saved it."""
    train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, steps=2), tmp_path)
    state = load_state(tmp_path)
    for group in state.optimizer["param_groups"]:
        group["fused"] = None
    optimizer = make_optimizer(mini, SETTINGS)
    restore_state(LossModule(mini), optimizer, state)
    assert all(group["fused"] for group in optimizer.param_groups)
    moments = optimizer.state[next(iter(mini.parameters()))]
    assert int(moments["step"]) == 2 and moments["exp_avg"].any()


@pytest.mark.release
def test_after_ten_updates_the_time_of_an_epoch_is_said(mini, processor, tmp_path, capsys) -> None:
    updates: list[tuple[int, float]] = []
    lines: list[str] = []
    train(
        mini,
        processor,
        SceneSamples(1, 22),
        replace(SETTINGS, steps=11, batch=2, save_every=100),
        tmp_path,
        after_update=lambda step, loss: updates.append((step, loss)),
        say=lines.append,
    )
    assert capsys.readouterr() == ("", "")  # a library does not print
    (epoch,) = [
        place for place, line in enumerate(lines) if re.fullmatch(r"An epoch of 11 updates takes about .*\.", line)
    ]
    assert lines[epoch - 1].startswith("step 10 of 11") and lines[epoch + 1].startswith("step 11 of 11")
    assert updates == [(row["step"], row["loss"]) for row in rows(tmp_path)]


@pytest.mark.release
def test_what_memory_needs_may_change_when_a_run_resumes(mini, mini_config, processor, tmp_path) -> None:
    """A run that ran out of memory must be able to resume with less at once."""
    train(mini, processor, SceneSamples(1, 8), replace(SETTINGS, steps=2), tmp_path)
    other = make_model(mini_config, processor, seed=3)
    less = replace(SETTINGS, steps=2, micro_batch=1, gradient_checkpointing=True)
    train(other, processor, SceneSamples(1, 8), less, tmp_path)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in weights(mini).items())
