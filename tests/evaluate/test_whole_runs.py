"""Whole runs over two dozen synthetic scenes: against official code, after a kill, and in two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from florence2.cli.main import main
from parity.record_runs import SCENES, SEED, TABLES
from parity.records import read_record
from recipes.nano.write_tables import write_tables
from tests.evaluate.test_detection import official

NANO = ["--model", "nano", "--device", "cpu", "--beams", "1", "--workers", "0"]
MAP = {"model": 91.7, "one": 91.6, "order": 91.7}
"""What nano reaches on these scenes."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_tables(folder, SEED, SCENES)
    return folder


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def results(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "report.json").read_text())["results"]
    return rows


@pytest.mark.parametrize("table", TABLES)
def test_a_run_is_scored_as_by_the_official_code(table: str, scenes: Path, tmp_path: Path) -> None:
    """The answers of a run, and what pycocoevalcap with Java and vqaEval.py say about them, were recorded."""
    recorded = read_record("evaluate/runs.json")
    folder = tmp_path / table.replace(":", "-")
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    (folder / "results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in recorded["answers"][table]))
    assert evaluate(table, "--data", scenes, "--out", tmp_path, "--score") == 0
    first = results(tmp_path)[0]
    assert first["value"] == pytest.approx(recorded["results"][table], abs=1e-8)  # the official code rounds there
    assert (first["unanswered"], first["images"]) == (0, len(recorded["answers"][table]))


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert evaluate("coco-detection", "--data", scenes, "--out", out, *NANO) == 0
    return out


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> list[dict[str, Any]]:
    """Its results."""
    return results(whole)


@pytest.mark.release
def test_map_is_that_of_a_script(scenes: Path, undisturbed: list[dict[str, Any]], whole: Path) -> None:
    """pycocotools reads the owners' file; labels are categories by name, which is all that nano needs."""
    file = scenes / "coco" / "annotations" / "instances_val2017.json"
    values = json.loads(file.read_text())
    ids = {image["file_name"]: image["id"] for image in values["images"]}
    categories = {category["name"]: category["id"] for category in values["categories"]}
    lines = (whole / "coco-detection-val2017" / "results.jsonl").read_text().splitlines()
    found = [
        {"image_id": ids[Path(row["id"]).name], "category_id": categories[box["label"]], "score": box["confidence"]}
        | {"bbox": [*box["xyxy"][:2], box["xyxy"][2] - box["xyxy"][0], box["xyxy"][3] - box["xyxy"][1]]}
        for row in map(json.loads, lines)
        for box in row["boxes"]
        if box["label"] in categories
    ]
    assert undisturbed[0]["value"] == pytest.approx(100 * official(file, found, whole), abs=1e-10)


@pytest.mark.release
def test_detection_reaches_what_it_did(undisturbed: list[dict[str, Any]]) -> None:
    found = {row["protocol"].removeprefix("od, "): row for row in undisturbed}
    assert {name: row["value"] for name, row in found.items()} == {
        name: pytest.approx(value, abs=1.0) for name, value in MAP.items()
    }
    for row in found.values():
        low, high = row["interval"]
        assert 1 < row["value"] - low < 8 and 1 < high - row["value"] < 8


@pytest.mark.release
def test_a_killed_run_is_resumed(scenes: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    """After SIGKILL no answer is asked for again, and the report is that of an undisturbed run."""
    common = ["coco-detection", "--data", scenes, "--out", tmp_path, *NANO]
    command = [sys.executable, "-m", "florence2", "evaluate", *map(str, common), "--batch", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = tmp_path / "coco-detection-val2017" / "results.jsonl"
    wait_for_rows(rows, 5)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    written = rows.read_bytes()
    whole = written[: written.rindex(b"\n") + 1]
    assert 5 <= whole.count(b"\n") < SCENES and not (tmp_path / "report.json").exists()
    assert evaluate(*common) == 0
    assert rows.read_bytes().startswith(whole)
    assert rows.read_bytes().count(b"\n") == SCENES
    assert same(results(tmp_path), undisturbed)


def wait_for_rows(file: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= count):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    """Whether two reports hold the same, but for the last digits of confidences."""
    return [rounded(row) for row in first] == [rounded(row) for row in second]


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"value": round(row["value"], 3), "interval": [round(each, 3) for each in row["interval"]]}


@pytest.mark.release
def test_two_processes(scenes: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    common = ["coco-detection", "--data", scenes, "--out", tmp_path, "--model", "nano", "--beams", "1"]
    assert evaluate(*common, "--workers", "0", "--devices", "cpu,cpu") == 0
    names = sorted(path.name for path in (tmp_path / "coco-detection-val2017").glob("*.jsonl"))
    assert names == ["results.1-of-2.jsonl", "results.2-of-2.jsonl"]
    assert same(results(tmp_path), undisturbed)
    used = json.loads((tmp_path / "report.json").read_text())["computed"]
    assert (used["device"], used["beams"]) == ("cpu", 1) and used["seconds"] > 0
