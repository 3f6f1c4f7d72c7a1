"""Calibration: from raw confidences and right or wrong answers to frequencies."""

import json
import os
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import florence2
from florence2.answers.answer import Answer, Box
from florence2.answers.confidence import Calibration
from florence2.checkpoints.checkpoint import convert_checkpoint
from florence2.checkpoints.checks.calibration import (
    choose_calibration,
    keeps_calibration,
    read_calibration,
    write_calibration,
)
from florence2.checkpoints.checks.weights import is_calibrated
from florence2.checkpoints.hub import resolve
from florence2.cli.main import main as florence2_main
from florence2.errors import ConfigError, Florence2Error, OptionError
from florence2.train.calibrate import calibration_error, fit, fit_table, rate, separation
from florence2.train.calibrate_command import _report, main
from recipes.nano.write_scenes import write_scenes

TABLE = {"boxes": {"raw": [0, 0.5, 1], "frequency": [0.1, 0.8, 0.9]}}


def drawn(count: int, seed: int = 0) -> list[tuple[float, bool]]:
    """Raw values whose squares are the frequencies of right answers."""
    rng = random.Random(seed)
    raw = [rng.random() for _ in range(count)]
    return [(value, rng.random() < value**2) for value in raw]


def test_the_table_finds_the_frequencies() -> None:
    calibration = Calibration({"boxes": fit_table(drawn(5000))})
    for raw in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert calibration(raw, "boxes") == pytest.approx(raw**2, abs=0.06)
    fresh = drawn(5000, seed=1)
    errors = [
        calibration_error([function(raw) for raw, _ in fresh], [right for _, right in fresh])
        for function in (float, lambda raw: calibration(raw, "boxes"))
    ]
    assert errors[0] > 0.1 and errors[1] < 0.02


@pytest.mark.parametrize(
    "rated",
    [
        drawn(50),
        [(0.5, True)] * 60,
        [(1.0, True)] * 60,
        [(0.0, False)] * 60,
        [(i / 99, False) for i in range(100)],
        [(i / 99, True) for i in range(100)],
        [(i / 99, i < 50) for i in range(100)],
        [(1 - 1e-9 * i, i % 3 > 0) for i in range(100)],
    ],
)
def test_it_keeps_the_order_and_can_be_read_again(rated: list[tuple[float, bool]], tmp_path: Path) -> None:
    """Strictly rising, within 0 to 1 and never certain, whatever the answers were."""
    calibration = Calibration({"boxes": fit_table(rated)})
    values = [calibration(raw, "boxes") for raw in np.linspace(0, 1, 101)]
    assert all(0 < value < 1 for value in values) and all(a < b for a, b in pairwise(values))
    write_calibration(tmp_path / "confidence.json", calibration, images=3, model="nano")
    assert read_calibration(tmp_path / "confidence.json") == calibration


def test_few_answers_make_no_table() -> None:
    calibration = fit({"boxes": drawn(50), "quads": drawn(49)})
    assert calibration.knows("boxes") and not calibration.knows("quads")
    with pytest.raises(OptionError, match="at most 49 regions or texts of one kind, too few"):
        fit({"quads": drawn(49)})
    with pytest.raises(OptionError, match="at most 0"):
        fit({})


def test_measures() -> None:
    assert separation([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert separation([0.5, 0.5], [True, False]) == 0.5 and separation([0.5], [True]) is None
    assert calibration_error([0.9, 0.9, 0.1, 0.1], [True, False, False, False]) == pytest.approx(0.25)
    assert calibration_error([1.0, 0.0], [True, False]) == 0 == calibration_error([], [])


def test_right_and_wrong_answers(small: florence2.Florence2) -> None:
    def answer(*boxes: Box, task: str = "<OD>") -> Answer:
        return Answer(task, "boxes", "", "", (1000, 1000), boxes=boxes)

    truth = answer(Box((0.0, 0.0, 100.0, 100.0), "cat"), Box((500.0, 500.0, 600.0, 600.0), "dog"))
    given = answer(
        Box((0.0, 0.0, 100.0, 90.0), "cat", confidence=0.9),
        Box((0.0, 0.0, 100.0, 80.0), "cat", confidence=0.8),  # the same cat once more
        Box((500.0, 500.0, 600.0, 600.0), "cat", confidence=0.7),
    )
    expected = [(0.9, True), (0.8, False), (0.7, False)]
    assert rate([(truth, given)]) == {"boxes": expected, "<OD>": expected}
    texts = [Answer("free", "text", text, text, (9, 9), confidence=0.5) for text in (" a cat ", "a dog")]
    wanted = Answer("free", "text", "a cat", "a cat", (9, 9))
    assert rate([(wanted, text) for text in texts]) == {"text": [(0.5, True), (0.5, False)]}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "the file lacks"),
        ({"tables": {"bexes": TABLE["boxes"]}}, "neither a kind of answer"),
        ({"tables": {"boxes": 3}}, "must be a JSON object"),
        ({"tables": {"boxes": {"raw": [0, 1]}}}, "lacks 'frequency'"),
        ({"tables": {"boxes": {"raw": [0, 1], "frequency": [0.1]}}}, "has 2 and 1 numbers"),
        ({"tables": {"boxes": {"raw": [0], "frequency": [0.1]}}}, "must have 2 to 1000"),
        ({"tables": {"boxes": {"raw": [0, 0.5, 0.5, 1], "frequency": [0.1, 0.2, 0.3, 0.4]}}}, "raw must rise strictly"),
        ({"tables": {"boxes": {"raw": [0, 0.9], "frequency": [0.1, 0.2]}}}, "from 0 to 1"),
        ({"tables": {"boxes": {"raw": [0, 1], "frequency": [0.2, 0.2]}}}, "frequency must rise strictly"),
        ({"tables": {"boxes": {"raw": [0, 1], "frequency": [0.2, 1.2]}}}, "within 0 to 1"),
        ({"tables": {"boxes": {"raw": [0, "1"], "frequency": [0.2, 0.3]}}}, "must be a list of float"),
        ({"tables": TABLE, "code": "x"}, "unknown field"),
        ({"tables": {f"<T{i}>": TABLE["boxes"] for i in range(1001)}}, "at most 1,000 are read"),
    ],
)
def test_damaged_files(values: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "confidence.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=problem):
        read_calibration(path)


def test_the_largest_calibration_is_read(tmp_path: Path) -> None:
    row = [i / 999 for i in range(1000)]
    tables = {f"<T{i}>": {"raw": [0, 1], "frequency": [0, 1]} for i in range(999)}
    (tmp_path / "a.json").write_text(json.dumps({"tables": {**tables, "<T>": {"raw": row, "frequency": row}}}))
    assert len(read_calibration(tmp_path / "a.json").tables) == 1000
    (tmp_path / "a.json").write_text(json.dumps({"tables": {"<T>": {"raw": [*row[:-1], 0.9995, 1], "frequency": row}}}))
    with pytest.raises(ConfigError, match="has 1001 and 1000 numbers; both rows must have 2 to 1000"):
        read_calibration(tmp_path / "a.json")


def test_text_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"tables": {"boxes": {"raw": [0, NaN], "frequency": [0, 1]}}}')
    (tmp_path / "b.json").write_text(" " * (1 << 20) + "{}")
    for name in ("a.json", "b.json", "c.json"):
        with pytest.raises(ConfigError):
            read_calibration(tmp_path / name)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scenes are answered, the file is written, and a model that is loaded with it says so."""
    write_scenes(tmp_path, 5, 24, ["<OD>"], spoilt=0.5)
    given = [str(tmp_path / "data.jsonl"), "--model", "nano", "--device", "cpu", "--beams", "1"]
    out = tmp_path / "own.json"
    assert main([*given, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(out) and captured.out.startswith("boxes ")
    with pytest.raises(OptionError, match="add --overwrite"):
        main([*given, "--out", str(out)])
    f = florence2.load("nano", device="cpu", calibration=out)
    raw = florence2.load("nano", device="cpu", changes={"vision.window_size": 6})
    assert {*f.processor.calibration.tables} == {"boxes", "<OD>"} and not raw.processor.calibration.tables
    answer = f.run("<OD>", tmp_path / "000000.png")
    assert answer.calibrated and "raw confidence" not in str(answer)
    assert all(0 < box.confidence < 1 for box in answer.boxes if box.confidence is not None)
    f.save(tmp_path / "saved")
    assert florence2.load(tmp_path / "saved", device="cpu").run("<OD>", tmp_path / "000000.png").boxes == answer.boxes


def test_too_few_answers_write_nothing(tmp_path: Path) -> None:
    write_scenes(tmp_path, 5, 2, ["<OD>"])
    given = [str(tmp_path / "data.jsonl"), "--model", "nano", "--device", "cpu", "--beams", "1"]
    with pytest.raises(Florence2Error, match="too few to calibrate"):
        main([*given, "--out", str(tmp_path / "own.json")])
    assert not (tmp_path / "own.json").exists()


@pytest.fixture
def own_nano(tmp_path: Path) -> Path:
    """A copy of nano in a folder that may be changed."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("nano"), folder)
    return folder


def test_a_damaged_calibration_is_read_only_where_it_is_used(own_nano: Path, tmp_path: Path) -> None:
    good = shutil.copy(own_nano / "confidence.json", tmp_path / "good.json")
    (own_nano / "confidence.json").write_text("{")
    with pytest.raises(ConfigError, match=r"calibrate --overwrite.*delete it.*--calibration FILE"):
        florence2.load(own_nano, device="cpu")
    assert florence2.load(own_nano, device="cpu", calibration=good).processor.calibration.tables
    assert not florence2.load(own_nano, device="cpu", calibration=Calibration({})).processor.calibration.tables
    assert not choose_calibration(own_nano, changes={"vision.window_size": 6}).tables
    with pytest.raises(ConfigError, match="give another file with --calibration"):
        convert_checkpoint(own_nano, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.release
def test_a_damaged_calibration_is_replaced(own_nano: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, 5, 24, ["<OD>"], spoilt=0.5)
    (own_nano / "confidence.json").write_text("{")
    given = [str(tmp_path / "data.jsonl"), "--model", str(own_nano), "--device", "cpu", "--beams", "1"]
    assert main([*given, "--overwrite"]) == 0
    assert read_calibration(own_nano / "confidence.json").knows("boxes")


def test_which_changes_keep_a_calibration(own_nano: Path, tmp_path: Path) -> None:
    """Load and convert agree: settings of generation keep it, and every other change drops it."""
    for i, (changes, kept) in enumerate([({"generation.num_beams": 1}, True), ({"vision.window_size": 6}, False)]):
        assert keeps_calibration(changes, None) == kept
        assert bool(florence2.load(own_nano, device="cpu", changes=changes).processor.calibration.tables) == kept
        convert_checkpoint(own_nano, tmp_path / str(i), changes=changes)
        assert (tmp_path / str(i) / "confidence.json").exists() == kept
    assert not keeps_calibration(None, lambda model: None)


def test_a_model_with_other_weights_is_saved_without_the_calibration(own_nano: Path, tmp_path: Path) -> None:
    f = florence2.load(own_nano, device="cpu")
    f.run("<OD>", Image.new("RGB", (64, 48), "green"), max_new_tokens=3)  # packs weights, and changes none
    f.save(tmp_path / "same", dtype="bfloat16")
    convert_checkpoint(tmp_path / "same", tmp_path / "float16", dtype=torch.float16)
    for folder in ("same", "float16"):
        stored = florence2.load(tmp_path / folder, device="cpu")
        assert is_calibrated(stored.processor.calibration, stored.model) and stored.processor.calibration.weights
        stored.save(tmp_path / f"{folder} again")
        assert (tmp_path / f"{folder} again" / "confidence.json").exists()
    with torch.no_grad():
        f.model.language_model.decoder.layers[0].fc1.bias[3] += 1e-3
    florence2.add_tasks(f, []).save(tmp_path / "other")
    assert not (tmp_path / "other" / "confidence.json").exists()


def test_the_weights_of_a_calibration(own_nano: Path) -> None:
    """They may be missing, as in files written by hand; then the calibration is taken at its word."""
    path = own_nano / "confidence.json"
    values = json.loads(path.read_text())
    for weights, problem in [([1.0], "weights has 1 numbers; it must have 2"), (["a", 1.0], "must be a list of float")]:
        path.write_text(json.dumps(values | {"weights": weights}))
        with pytest.raises(ConfigError, match=problem):
            read_calibration(path)
    path.write_text(json.dumps({"tables": values["tables"]}))
    f = florence2.load(own_nano, device="cpu")
    assert f.processor.calibration.weights is None and is_calibrated(f.processor.calibration, f.model)


@pytest.mark.parametrize(
    "change", [["--change", "vision.window_size=6"], ["--prepare", "os:getcwd"], ["--adapter", "adapter"]]
)
def test_another_model_needs_a_file_of_its_own(change: list[str], own_nano: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "adapter").mkdir()
    change = [str(tmp_path / part) if part == "adapter" else part for part in change]
    given = [str(tmp_path / "data.jsonl"), "--model", str(own_nano), *change, "--overwrite"]
    for out in ([], ["--out", str(own_nano / "confidence.json")]):
        with pytest.raises(OptionError, match="say where to write instead: --out FILE"):
            main([*given, *out])


def test_a_file_that_cannot_be_written_is_found_before_any_answer(
    own_nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text("")  # would be refused next
    (tmp_path / "list.json").write_text("[]")
    given = [str(tmp_path / "data.jsonl"), "--model", str(own_nano), "--overwrite"]
    for out, problem in [
        (tmp_path / "nodir" / "x.json", "not a folder that may be written"),
        (tmp_path / "data.jsonl" / "x.json", "cannot be written"),
        (own_nano, "is not a calibration"),
        (Path("/dev/null"), "is not a calibration"),
        (own_nano / "config.json", "is not a calibration"),
        (tmp_path / "list.json", "is not a calibration"),
        (own_nano / "tasks.json", "not a name for a calibration"),
        (tmp_path / ("x" * 300 + ".json"), "cannot be written"),
    ]:
        with pytest.raises(OptionError, match=problem):
            main([*given, "--out", str(out)])
    with pytest.raises(SystemExit):
        main([*given, "--calibration", "x.json"])
    assert "unrecognized arguments: --calibration" in capsys.readouterr().err


def test_files_that_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; give a file that `florence2 calibrate` has written"):
        read_calibration(tmp_path / "absent.json")
    os.mkfifo(tmp_path / "pipe.json")
    for path in (Path("/dev/zero"), tmp_path / "pipe.json", tmp_path):
        with pytest.raises(ConfigError, match="is not a regular file"):
            read_calibration(path)
    table = json.dumps(TABLE["boxes"])
    (tmp_path / "twice.json").write_text(f'{{"tables": {{"boxes": {table}, "boxes": {table}}}}}')
    with pytest.raises(ConfigError, match="the key 'boxes' occurs twice"):
        read_calibration(tmp_path / "twice.json")


@pytest.mark.parametrize("right", [True, False])
def test_the_ends_invent_nothing(right: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """An end is as far from its outer group as one more answer there would move it."""
    rated = [(0.2 + i / 400, right) for i in range(100)]
    table = fit_table(rated)
    assert table[1][0] < table[1][-1] and (min(table[1]) > 0.97 if right else max(table[1]) < 0.03)
    _report(Calibration({"boxes": table}), {"boxes": rated})
    assert f"{'all' if right else 'none'} of the 100 answers of boxes are right" in capsys.readouterr().err


def test_answers_at_an_end_are_counted_there() -> None:
    rated = [(0.5, i % 2 > 0) for i in range(60)] + [(1.0, i % 10 > 0) for i in range(60)]
    assert fit_table(rated)[1][-1] == pytest.approx(0.9, abs=0.01)


def test_training_does_not_read_a_calibration(own_nano: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, 5, 2, ["<OD>"])
    (own_nano / "confidence.json").write_text("{")
    given = ["train", str(tmp_path / "data.jsonl"), "--model", str(own_nano), "--device", "cpu", "--check"]
    assert florence2_main(given) == 0
