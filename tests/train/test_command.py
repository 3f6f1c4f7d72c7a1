"""The command, from a data file to the run folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from florence2.bulk.lock import LOCK_NAME, FolderLock
from florence2.errors import Florence2Error, OptionError
from florence2.evaluate.command import main as evaluate_main
from florence2.pipeline import Florence2
from florence2.train.command import main
from florence2.train.samples import Sample
from tests.release import keep

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def whole(data: Path, mini_folder: Path, tmp_path: Path) -> list[str]:
    """A run of one update of two images."""
    words = f"{data} --model {mini_folder} --out {tmp_path / 'run'} --steps 1 --batch 2 --workers 0 --device cpu"
    return [*words.split(), "--learning-rate", "1e-2", "--warmup", "0"]


@pytest.fixture
def given(whole: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same without an estimate of the memory and a drawing of the losses, which take longer than the update."""
    monkeypatch.setattr("florence2.train.run.describe_memory", lambda need: None)
    monkeypatch.setattr("florence2.train.plot.plot_log", lambda log, path: None)
    return whole


@pytest.fixture
def coco(data: Path, tmp_path: Path) -> Path:
    """One object on one of the images."""
    values: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": 1, "file_name": "000000.png"}],
        "categories": [{"id": 3, "name": "cup"}],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 3, "bbox": [10, 20, 100, 120]}],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(values))
    return path


def settings(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "settings.json").read_text())
    return values


def test_images_of_a_run_may_vary(given: list[str], tmp_path: Path) -> None:
    def loss(run: Path) -> float:
        return float(json.loads((run / "log.jsonl").read_text().splitlines()[0])["loss"])

    assert main(given) == 0
    given[given.index("--out") + 1] = str(tmp_path / "varied")
    assert main([*given, "--flip", "1", "--shrink", "0.5", "--colour", "0.2"]) == 0
    assert loss(tmp_path / "varied") != loss(tmp_path / "run")
    assert {"flip": 1.0, "shrink": 0.5, "colour": 0.2}.items() <= settings(tmp_path / "varied").items()


def test_a_run(whole: list[str], data: Path, mini_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(whole) == 0
    run = tmp_path / "run"
    assert capsys.readouterr().out == f"{run / 'checkpoint'}\n"
    files = {path.name for path in run.iterdir()}
    assert files == {LOCK_NAME, "settings.json", "log.jsonl", "state.pt", "curve.png", "checkpoint"}
    assert {p.name for p in (run / "checkpoint").iterdir()} == {p.name for p in mini_folder.iterdir()}
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    before, after = (load_file(folder / "model.safetensors") for folder in (mini_folder, run / "checkpoint"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    kept = settings(run)
    assert kept["steps"] == 1 and kept["learning_rate"] == 1e-2 and kept["seed"] == 0
    assert kept["data"] == str(data) and kept["model"] == str(mini_folder)
    absent = {name: kept[name] for name in ("images", "validation", "revision", "task", "lora")}
    assert absent == {"images": None, "validation": None, "revision": None, "task": [], "lora": None}


def test_what_is_frozen_is_counted_so_and_stays(
    given: list[str], mini_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main([*given, "--freeze", "vision"]) == 0
    captured = capsys.readouterr().err
    before, after = (load_file(f / "model.safetensors") for f in (mini_folder, tmp_path / "run" / "checkpoint"))
    vision = [name for name in before if name.startswith("vision_tower.")]
    count = sum(before[name].numel() for name in vision)
    assert f"vision: 0 of {count:,};" in captured and "projection: 0 of" not in captured
    assert all(torch.equal(before[name], after[name]) for name in vision)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("encoder" in name for name in moved) and any("decoder" in name for name in moved)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--epochs nan", "--epochs is nan; it must be above 0"),
        ("--epochs inf", "--epochs is inf; it must be above 0 and at most"),
        ("--epochs 0", "--epochs is 0.0"),
        ("--steps 0", "--steps is 0; it must be at least 1"),
        ("--batch 0", "--batch is 0; it must be at least 1"),
        ("--lora 0", "--lora is 0; it must be at least 1"),
        ("--lora 2 --lora-alpha 0", "--lora-alpha is 0.0; it must be above 0"),
        ("--lora-alpha 4", "--lora-alpha .* give --lora RANK too"),
        ("--lora-names native", "--lora-names .* give --lora RANK too"),
        ("--seed -1", "--seed is -1; it must be at least 0"),
        ("--seed 1000000000000000000000", "--seed is 1000000000000000000000; .* below"),
        ("--flip 2", "--flip is 2.0; it must be from 0 to 1"),
        ("--shrink 0", "--shrink is 0.0; it must be from 0.1 to 1"),
        ("--learning-rate inf", "--learning-rate is inf; it must be above 0 and at most"),
        ("--weight-decay nan", "--weight-decay must be finite"),
        ("--freeze visoin", "Unknown part to freeze: 'visoin'"),
        ("--validation nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("--batch 5", "4 images are fewer than one batch of 5"),
        ("--store here", "--store and --store-limit keep features of a frozen vision tower, but here it trains"),
        ("--store-limit 3", "--store and --store-limit keep features of a frozen vision tower, but here it trains"),
        ("--freeze vision --store-limit nan", "--store-limit is nan; it must be above 0 and finite"),
        ("--freeze vision --store-limit 3 --no-store", "--no-store keeps no features; leave it out"),
    ],
)
def test_what_cannot_be_meant(given: list[str], words: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(Florence2Error, match=sentence):
        main([*given, *words.split()])
    assert not (tmp_path / "run").exists()


def test_one_run_at_a_time_writes_to_a_folder(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its checkpoint is written."""
    (tmp_path / "run").mkdir()
    with (
        FolderLock(tmp_path / "run"),
        pytest.raises(OptionError, match=r"Another run is writing to .*run; wait until it ends, or choose another"),
    ):
        main(given)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_NAME]
    held: list[str] = []

    def write(*_: object) -> Path:
        with pytest.raises(OptionError, match="Another run") as error:
            FolderLock(tmp_path / "run")
        held.append(str(error.value))
        return tmp_path

    monkeypatch.setattr("florence2.train.run._write_result", write)
    assert main(given) == 0 and len(held) == 1
    FolderLock(tmp_path / "run").release()


def test_a_run_goes_on_and_says_so(given: list[str], capsys: Capture) -> None:
    main(given)
    assert "Resuming" not in capsys.readouterr().err
    assert main([*given, "--save-every", "1", "--log-every", "3", "--workers", "1"]) == 0  # none of it changes weights
    assert "Resuming run after step 1 of 1." in capsys.readouterr().err


def test_a_run_on_other_answers_is_another_run(given: list[str], data: Path, tmp_path: Path) -> None:
    lines = (data / "data.jsonl").read_text().splitlines()
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines))
    words = [str(file), *given[1:], "--images", str(data)]
    main(words)
    file.write_text("\n".join([*lines[:-1], lines[-1].replace("a ", "one ")]))
    with pytest.raises(Florence2Error, match=r"other settings \(questions was '.*' and is '.*'\)"):
        main(words)


def test_what_is_measured_later_is_checked_before(
    given: list[str], data: Path, coco: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "000000.png").write_bytes((data / "000000.png").read_bytes()[:900])
    with pytest.raises(Florence2Error, match="Some prompts or images cannot be used"):
        main([*given, "--validation", str(_lines(tmp_path))])
    assert "unreadable: 000000.png" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*given, "--check", "--validation", str(_lines(tmp_path))]) == 1
    assert "unreadable: 000000.png" in capsys.readouterr().out


def _lines(folder: Path) -> Path:
    (folder / "later.jsonl").write_text(json.dumps({"image": "000000.png", "prefix": "<CAPTION>", "suffix": "x"}))
    return folder / "later.jsonl"


def test_of_a_coco_file_the_trained_task_is_measured(
    given: list[str], data: Path, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def see(model: Florence2, samples: list[Sample], progress: object, stored: object) -> dict[str, Any]:
        seen.append(samples)
        return {}

    monkeypatch.setattr("florence2.train.run.evaluate", see)
    words = [str(coco), *given[1:], "--images", str(data), "--validation", str(coco), "--batch", "1"]
    assert main([*words, "--task", "<REGION_TO_CATEGORY>"]) == 0
    ((sample,),) = seen  # one evaluation, of one sample
    assert [(prefix[:20], suffix) for prefix, suffix in sample.pairs] == [("<REGION_TO_CATEGORY>", "cup")]


def test_of_several_processes_one_writes(
    given: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("florence2.train.trainer.is_first_process", lambda: False)
    monkeypatch.setenv("RANK", "1")
    assert main(given) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "answers" not in captured.err and "Parameters" not in captured.err
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.release
def test_the_seed_draws_the_adapter(given: list[str], tmp_path: Path) -> None:
    weights = []
    for seed in ("0", "1"):
        out = tmp_path / seed
        assert main([*given, "--out", str(out), "--lora", "2", "--seed", seed]) == 0
        weights.append(load_file(out / "adapter" / "adapter_model.safetensors"))
    name = next(name for name in weights[0] if name.endswith("lora_A.weight"))
    apart = (weights[0][name] - weights[1][name]).abs().max()
    assert apart > 0.1  # one update moves an entry by 0.01


def test_images_that_vary_are_not_stored(given: list[str], tmp_path: Path, capsys: Capture) -> None:
    words = [*given, "--freeze", "vision", "--steps", "3", "--shrink", "0.5"]
    with pytest.raises(OptionError, match="show an image differently in each epoch, so its features"):
        main([*words, "--store", str(tmp_path / "features")])
    with pytest.raises(OptionError, match="Leave these out, or --store and --store-limit"):
        main([*words, "--store-limit", "3"])
    assert main(words) == 0
    assert not (tmp_path / "run" / "features").exists()
    assert "Images vary, so the frozen vision tower encodes them in every epoch." in capsys.readouterr().err


def shards(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("part", keep(["--freeze vision"], ["--freeze vision", "--lora 2"]))
def test_a_frozen_tower_is_stored_with_the_run(given: list[str], part: str, tmp_path: Path, capsys: Capture) -> None:
    """Where an image is seen twice. The next run and an evaluation of its result read the same features."""
    run, words = tmp_path / "run", [*given, *part.split()]
    assert main(words) == 0 and not (run / "features").exists()
    words += ["--steps", "3", "--out"]
    assert main([*words, str(tmp_path / "other"), "--no-store"]) == 0 and not (tmp_path / "other" / "features").exists()
    assert "Frozen parts compute without dropout and stochastic depth: vision" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "first")]) == 0
    features = tmp_path / "first" / "features"
    kept = shards(features)
    assert kept and "each of 4 images is encoded once. 0 are in" in capsys.readouterr().err
    assert settings(tmp_path / "first")["store"] is True and "store" not in settings(tmp_path / "other")
    assert main([*words, str(tmp_path / "second"), "--store", str(features)]) == 0
    assert f"The features of all 4 images are in {features}" in capsys.readouterr().err
    result = ["--model", str(tmp_path / "first" / "checkpoint")]
    if part.startswith("--lora"):
        result = [given[1], given[2], "--adapter", str(tmp_path / "first" / "adapter")]
    asked = [given[0], *result, "--beams", "1", "--max-new-tokens", "5", "--device", "cpu"]
    assert evaluate_main(asked) == 0
    plain = capsys.readouterr().out
    assert evaluate_main([*asked, "--store", str(features)]) == 0
    assert capsys.readouterr().out == plain and shards(features) == kept
    assert not (tmp_path / "second" / "features").exists()


@pytest.mark.release
def test_validation_reads_what_training_stored(given: list[str], data: Path, tmp_path: Path) -> None:
    """Its other images are added once, whatever the number of evaluations."""
    last = (data / "data.jsonl").read_text().splitlines()[-1]
    (tmp_path / "last.jsonl").write_text(last.replace("000003", f"{data}/000003"))
    words = [*given, "--freeze", "vision", "--steps", "3", "--save-every", "2"]
    assert main([*words, "--validation", str(tmp_path / "last.jsonl")]) == 0
    assert sum("evaluation" in line for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    assert len(shards(tmp_path / "run" / "features")) == 1


def test_features_without_room_are_refused_before_anything_is_written(given: list[str], tmp_path: Path) -> None:
    words = [*given, "--freeze", "vision", "--steps", "3", "--store-limit", "1e-6"]
    with pytest.raises(OptionError, match=r"need 0\.0 MB in .*features, .*limit of 1e-06 GB \(--store-limit\)"):
        main(words)
    assert not shards(tmp_path) and not (tmp_path / "run" / "checkpoint").exists()
    assert main([*words[:-2], "--store-limit", "1"]) == 0


def test_options_of_the_store_elsewhere(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="file is a file; features need a folder"):
        main([*given, "--freeze", "vision", "--store", str(tmp_path / "file")])
    asked = [given[0], *given[1:3], "--store-limit", "3"]
    with pytest.raises(OptionError, match="--store-limit bounds the folder of --store; give --store DIR too"):
        evaluate_main(asked)
    with pytest.raises(OptionError, match="--store goes with a data file"):
        evaluate_main(["coco-caption", "--store", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path)])
