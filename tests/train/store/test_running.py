"""Training from the store: the losses of training without it, one pass through the tower, and the same bits always."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from florence2.bulk.lock import FolderLock
from florence2.errors import CheckpointError, ConfigError, ImageError, OptionError
from florence2.model.florence2 import Florence2Model
from florence2.train.checkpoints import load_state
from florence2.train.data import make_batch
from florence2.train.lora import LoraSettings, add_lora
from florence2.train.loss import LossModule
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings
from florence2.train.store import grids
from florence2.train.store.filling import StoreOptions
from florence2.train.trainer import make_optimizer, train
from parity.recipe import make_picture
from recipes.nano.train import SceneSamples, make_model
from tests.release import keep
from tests.train.disturbed import DisturbedSamples, send
from tests.train.store import shared

ROOT = Path(__file__).parents[3]
SETTINGS = TrainSettings(
    steps=5, batch=4, learning_rate=1e-3, warmup=2, save_every=2, log_every=1, workers=0, seed=5, freeze=("vision",)
)
IMAGES = 8


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def count_encoded(model: Florence2Model) -> list[int]:
    """Note how many images go through the tower in each call."""
    calls: list[int] = []
    model.vision_tower.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    return calls


@pytest.mark.parametrize(
    ("change", "within"),
    keep(
        [0, 2],
        [
            ({}, 1e-6),
            ({"micro_batch": 1}, 1e-6),
            ({"micro_batch": 3, "gradient_checkpointing": True}, 1e-6),
            ({"precision": "bfloat16"}, 2e-3),
            ({"workers": 2}, 1e-6),
        ],
    ),
)
def test_the_losses_are_those_without_it(mini, mini_config, processor, tmp_path, change, within) -> None:
    """Step by step, with dropout in the language model."""
    settings, other = replace(SETTINGS, **change), make_model(mini_config, processor, seed=3)
    train(mini, processor, SceneSamples(1, IMAGES), settings, tmp_path / "plain")
    train(other, processor, SceneSamples(1, IMAGES), settings, tmp_path / "run", store=StoreOptions(tmp_path / "s"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=within)
    assert len(losses(tmp_path / "run")) == 5


def test_each_image_goes_through_the_tower_once(mini, processor, tmp_path) -> None:
    """Two samples of one image, too. Of a second run only one image does, to compare it with what is stored."""
    calls = count_encoded(mini)
    samples = [Sample(make_picture(n % 3, 70, 60), (("<CAPTION>", f"image {n}"),)) for n in range(6)]
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    store = StoreOptions(tmp_path / "s")
    heard = {"say": said.append, "progress": lambda *place: seen.append(place)}
    train(mini, processor, samples, SETTINGS, tmp_path / "one", store=store, **heard)
    assert calls == [1] * 3 and seen == [(1, 3), (2, 3), (3, 3)]
    first = "\n".join(said)
    assert f"each of 3 images is encoded once. 0 are in {tmp_path / 's'}; the others need 0.0 MB there." in first
    train(mini, processor, samples, SETTINGS, tmp_path / "two", store=store, **heard)
    assert calls == [1] * 4
    assert f"The features of all 3 images are in {tmp_path / 's'}" in "\n".join(said)


def test_only_images_of_the_run_are_encoded(mini, processor, tmp_path) -> None:
    calls = count_encoded(mini)
    train(
        mini, processor, SceneSamples(1, 20), replace(SETTINGS, steps=2), tmp_path, store=StoreOptions(tmp_path / "s")
    )
    assert len(calls) == 8


def test_frozen_parts_keep_no_state_and_get_no_gradient(mini, processor, tmp_path) -> None:
    settings = replace(SETTINGS, freeze=("vision", "embeddings"))
    before = {name: value.clone() for name, value in mini.state_dict().items()}
    train(mini, processor, SceneSamples(1, IMAGES), settings, tmp_path, store=StoreOptions(tmp_path / "s"))
    frozen = {name for name, p in mini.named_parameters() if not p.requires_grad}
    assert {"language_model.shared.weight", "vision_tower.convs.0.conv.weight"} <= frozen
    assert all(p.grad is None for name, p in mini.named_parameters() if name in frozen)
    assert all(torch.equal(before[name], mini.state_dict()[name]) for name in frozen)
    state = load_state(tmp_path)
    trained = sum(p.numel() for p in mini.parameters() if p.requires_grad)
    assert not {name.removeprefix("model.") for name in state.parameters} & frozen
    moments = [v for each in state.optimizer["state"].values() for k, v in each.items() if k.startswith("exp_avg")]
    assert sum(value.numel() for value in moments) == 2 * trained
    assert (tmp_path / "state.pt").stat().st_size < 3 * 4 * trained + 100_000


@pytest.mark.release
def test_an_adapter_on_the_language_model_takes_the_same_road(mini, mini_config, processor, tmp_path) -> None:
    other, settings = make_model(mini_config, processor, seed=3), replace(SETTINGS, freeze=())
    for model in (mini, other):
        add_lora(model, LoraSettings(2), seed=1)
    calls = count_encoded(other)
    train(mini, processor, SceneSamples(1, IMAGES), settings, tmp_path / "plain")
    train(other, processor, SceneSamples(1, IMAGES), settings, tmp_path / "run", store=StoreOptions(tmp_path / "s"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6) and len(calls) == IMAGES


@pytest.mark.parametrize("after", keep([0], [IMAGES + 5, 3 * IMAGES]))
def test_an_interrupted_run_comes_to_the_same_bits(mini, mini_config, processor, tmp_path, after) -> None:
    """Stopped while it encodes the fifth image, and in the second update. Nothing is encoded twice."""
    train(mini, processor, SceneSamples(1, IMAGES), SETTINGS, tmp_path / "whole", store=StoreOptions(tmp_path / "a"))
    stopped, again = (make_model(mini_config, processor, seed=3) for _ in range(2))
    store = StoreOptions(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        train(
            stopped,
            processor,
            DisturbedSamples(1, IMAGES, after, send(signal.SIGTERM)),
            SETTINGS,
            tmp_path / "run",
            store=store,
        )
    calls = count_encoded(again)
    train(again, processor, SceneSamples(1, IMAGES), SETTINGS, tmp_path / "run", store=store)
    assert len(calls) == 1 + (IMAGES - 4 if after < 2 * IMAGES else 0)  # one to compare it with what is stored
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in mini.state_dict().items())
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def script(*arguments: object, launcher: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *launcher, shared.__file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.release  # five processes, of which one is killed
def test_killed_and_shared_runs_come_to_the_same_weights(processor_folder, tmp_path, monkeypatch, capfd) -> None:
    """Killed while it encodes, resumed to the bits of an undisturbed run; and encoded by two processes."""
    monkeypatch.setattr(grids, "SHARD_BYTES", grids.SHARD_BYTES)  # which `run` changes
    shared.run(processor_folder, tmp_path / "whole", 1000)
    killed = script(processor_folder, tmp_path / "killed", 13)  # eight reads for the keys, then five to encode
    assert killed.returncode == -signal.SIGKILL
    shards = list((tmp_path / "killed" / "features").rglob("*.safetensors"))
    assert len(shards) == 2 and not (tmp_path / "killed" / "state.pt").exists()
    shared.run(processor_folder, tmp_path / "killed", 1000)
    assert "each of 8 images is encoded once. 4 are in" in capfd.readouterr().err
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = script(processor_folder, tmp_path / "two", 1000, launcher=launcher)
    assert two.returncode == 0, two.stderr[-2000:]
    assert two.stderr.count("is encoded once") == 1
    assert len(list((tmp_path / "two" / "features").rglob("*.safetensors"))) == 4
    whole, resumed, other = (
        torch.load(tmp_path / name / "state.pt", weights_only=True)["parameters"] for name in ("whole", "killed", "two")
    )
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=2e-5)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.release
def test_damage_before_a_run_is_encoded_again_and_during_it_refused(
    mini, mini_config, processor, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(grids, "SHARD_BYTES", 1)
    samples, store = SceneSamples(1, IMAGES), StoreOptions(tmp_path / "s")
    train(mini, processor, samples, SETTINGS, tmp_path / "whole", store=store)
    shards = sorted((tmp_path / "s").rglob("*.safetensors"))
    for shard in shards[:2]:
        shard.write_bytes(shard.read_bytes()[:-4] + b"spam")
    shards[2].write_bytes(b"")
    again = make_model(mini_config, processor, seed=3)
    calls = count_encoded(again)

    def spoil() -> None:
        shards[5].write_bytes(shards[5].read_bytes()[:-4] + b"spam")

    samples_then_spoilt = DisturbedSamples(1, IMAGES, 2 * IMAGES - 2, spoil)
    said: list[str] = []
    with pytest.raises(CheckpointError, match="scene 1/.: .*was damaged.* removed. Give the same command again"):
        train(again, processor, samples_then_spoilt, SETTINGS, tmp_path / "run", store=store, say=said.append)
    assert len(calls) == 3 + 1 and "\n".join(said).count("its images are encoded again.") == 3
    train(again, processor, samples, SETTINGS, tmp_path / "other", store=store)
    assert not shards[5].exists() or shards[5].read_bytes()[-4:] != b"spam"


def test_a_changed_image_is_not_trained_on(mini, processor, tmp_path) -> None:
    """Its file is written again after it was encoded."""
    files = [tmp_path / f"{n}.png" for n in range(4)]
    for n, file in enumerate(files):
        make_picture(n, 60, 50).save(file)

    class Changing:
        reads = 0

        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> Sample:
            self.reads += 1
            if self.reads == 10:
                make_picture(9, 61, 50).save(files[0])
            return Sample(files[index], (("<CAPTION>", "x"),), files[index].name)

    with pytest.raises(ImageError, match=r"0\.png: The image has changed since it was encoded. Give the same"):
        train(mini, processor, Changing(), SETTINGS, tmp_path / "run", store=StoreOptions(tmp_path / "s"))


def test_changed_code_of_the_tower_is_noticed(mini, processor, tmp_path) -> None:
    store = StoreOptions(tmp_path / "s")
    train(mini, processor, SceneSamples(1, IMAGES), SETTINGS, tmp_path / "one", store=store)
    mini.vision_tower.register_forward_hook(lambda *values: values[2] * 1.5)
    with pytest.raises(ConfigError, match="differ by 50% .*code has changed. Remove this folder, or give another"):
        train(mini, processor, SceneSamples(1, IMAGES), SETTINGS, tmp_path / "two", store=store)


def test_it_says_what_it_needs_before_it_writes(mini, processor, tmp_path, monkeypatch) -> None:
    store = StoreOptions(tmp_path / "s", limit=5e-5)
    with pytest.raises(
        OptionError, match=r"of 8 of 8 images need 0\.1 MB in .*limit of 5e-05 GB \(--store-limit\).*has --no-store"
    ):
        train(mini, processor, SceneSamples(1, IMAGES), SETTINGS, tmp_path / "run", store=store)
    assert not list((tmp_path / "s").rglob("*.safetensors"))
    usage = type("Usage", (), {"free": 5000})
    monkeypatch.setattr("florence2.train.store.filling.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OptionError, match=r"and the disk has 0\.0 MB free"):
        train(mini, processor, SceneSamples(1, IMAGES), SETTINGS, tmp_path / "run", store=StoreOptions(tmp_path / "s"))


def test_two_runs_do_not_fill_one_store(mini, processor, tmp_path) -> None:
    (tmp_path / "s").mkdir()
    with FolderLock(tmp_path / "s"), pytest.raises(OptionError, match="Another run is writing to .*s; wait"):
        train(mini, processor, SceneSamples(1, IMAGES), SETTINGS, tmp_path / "r", store=StoreOptions(tmp_path / "s"))


def test_a_run_does_not_change_between_both_roads(mini, processor, tmp_path) -> None:
    """They round otherwise, so the bits would differ from those of an undisturbed run."""
    train(mini, processor, SceneSamples(1, IMAGES), SETTINGS, tmp_path / "r", store=StoreOptions(tmp_path / "s"))
    with pytest.raises(ConfigError, match=r"other settings \(store was True and is None\)"):
        train(mini, processor, SceneSamples(1, IMAGES), SETTINGS, tmp_path / "r")


def test_it_is_refused_where_it_would_be_wrong(mini, processor, tmp_path) -> None:
    def collate(samples: object, processor: object, length: int) -> object:
        return make_batch(samples, processor, length)

    given = (processor, SceneSamples(1, IMAGES))
    for settings, more in (
        (replace(SETTINGS, freeze=()), {}),
        (replace(SETTINGS, flip=0.5), {}),
        (SETTINGS, {"objective": LossModule(mini)}),
        (SETTINGS, {"collate": collate}),
    ):
        mini.requires_grad_(True)
        with pytest.raises(ConfigError, match="can be stored only where it is frozen, with the default loss"):
            train(mini, *given, settings, tmp_path / "r", store=StoreOptions(tmp_path / "s"), **more)
    assert not (tmp_path / "r").exists() and make_optimizer(mini, SETTINGS)
