"""`docs/ray_label.py` on a local Ray with two CPU actors: killed and repeated, it has each row once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from parity.recipe import make_picture

ROOT = Path(__file__).parents[2]
RUN = """
import sys, time
import ray
import ray_label
from florence2.ray import Labeler

seconds = float(sys.argv[3])

class Slow(Labeler):
    def __call__(self, batch):
        time.sleep(seconds)
        return super().__call__(batch)

ray_label.Labeler = Slow
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[4])
labeler = {"model": "nano", "task": "<OD>", "max_new_tokens": 20, "loading": {"device": "cpu"}}
ray_label.label(ray_label.Path(sys.argv[1]), ray_label.Path(sys.argv[2]), labeler, actors=2, batch_size=1)
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images, of which one is broken, and a file of another kind."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        make_picture(number, 40, 30).save(folder / f"{number:02}.png")
    (folder / "05.png").write_bytes(b"not an image")
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture
def start(photos: Path, tmp_path: Path) -> Any:
    """Start the example; each batch takes some seconds more."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'docs'}", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    environment |= {"RAY_worker_niceness": "0"}  # at Ray's 15 they stand still while other processes keep the CPUs busy
    started: list[subprocess.Popen[bytes]] = []

    def start(seconds: float) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", RUN, photos, tmp_path / "out", str(seconds), sockets]
        with (tmp_path / "log").open("ab") as log:
            started.append(subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=log, stderr=log))
        return started[-1]

    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as sockets:  # their paths may have 107 bytes
        yield start
        for driver in started:  # as after a test that failed
            if driver.poll() is None:
                kill(driver)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def kill(driver: "subprocess.Popen[bytes]") -> None:
    """Kill a driver, and what it has started if that does not end by itself."""
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 20
    while (left := [process for process in started if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        process.kill()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_killed_and_repeated_each_row_is_there_once(start: Any, photos: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", tmp_path / "out.checkpoint"
    driver, deadline = start(1.0), time.monotonic() + 90
    while driver.poll() is None and len(list(checkpoint.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert driver.poll() is None, (tmp_path / "log").read_text()
    kill(driver)
    before = {row["path"] for row in rows_of(out)}
    assert 3 <= len(before) < 12

    assert start(0.0).wait(120) == 0, (tmp_path / "log").read_text()
    rows = sorted(rows_of(out), key=lambda row: row["path"])
    assert [row["path"] for row in rows] == [str(photos / f"{number:02}.png") for number in range(12)]
    assert [row["error"] is not None for row in rows] == [number == 5 for number in range(12)]
    assert start(0.0).wait(120) == 0 and len(rows_of(out)) == 12  # all is done
    compare(rows, label(photos, tmp_path / "labelled"))


def label(photos: Path, out: Path) -> list[dict[str, Any]]:
    words = ["label", str(photos), "--task", "od", "--model", "nano", "--out", str(out), "--max-new-tokens", "20"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "florence2", *words], env=environment, check=False, capture_output=True)
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def compare(rows: list[dict[str, Any]], labelled: list[dict[str, Any]]) -> None:
    """The same answers; how many share a step may change the last digits of their scores."""
    assert len(rows) == len(labelled)
    for row, expected in zip(rows, labelled, strict=True):
        assert row["place"] == expected["place"] and (row["error"] is None) == ("error" not in expected)
        assert row["raw_text"] == expected.get("raw_text") and row["task"] == expected["task"] == "<OD>"
        for box, other in zip(row["boxes"] or (), expected.get("boxes", ()), strict=True):
            assert (box["xyxy"], box["label"]) == (other["xyxy"], other["label"])
            assert box["confidence"] == pytest.approx(other["confidence"], rel=0, abs=2e-5)
