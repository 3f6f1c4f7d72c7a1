"""Calibration: from raw confidences and right or wrong answers to frequencies."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import florence2
from florence2.answers.answer import Answer, Box
from florence2.answers.confidence import Calibration
from florence2.checkpoints.checks.calibration import read_calibration, write_calibration
from florence2.errors import ConfigError, Florence2Error, OptionError
from florence2.train.calibrate import calibration_error, fit, fit_table, rate, separation
from florence2.train.calibrate_command import main
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
