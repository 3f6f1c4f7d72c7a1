"""`florence2 label`: the same rows however often it was killed, in whatever batches, workers and shards."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from florence2.cli.main import main
from florence2.label.labelling import Labelling
from parity.recipe import make_picture

FEW = ["--task", "caption", "--task", "od", "--model", "nano", "--beams", "1", "--max-new-tokens", "8"]
Capture = pytest.CaptureFixture[str]


def label(*arguments: object) -> int:
    return main(["label", *map(str, arguments)])


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def start(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "florence2", "label", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_rows(results: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (results.exists() and results.read_bytes().count(b"\n") >= count):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that are killed: the last digits of scores depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.release  # two stops, each of a process
def test_rows_are_the_same_after_any_stop(tmp_path: Path) -> None:
    """A kill and a SIGTERM, at different stages."""
    photos, results = tmp_path / "photos", tmp_path / "stopped" / "results.jsonl"
    photos.mkdir()
    for number in range(24):
        make_picture(number, 40, 30).save(photos / f"{number:02}.png")
    common = [photos, *FEW[2:], "--batch", 1]
    for count, number in ((3, signal.SIGTERM), (13, signal.SIGKILL)):
        process = start(*common, "--out", tmp_path / "stopped", "--workers", 1)
        wait_for_rows(results, count)
        process.send_signal(number)
        _, words = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGTERM else -9)
        assert "stopped; the rows written so far are kept in" in words or number == signal.SIGKILL
        assert "Traceback" not in words
        assert [row["id"] for row in rows_of(results)] == [f"{i:02}.png" for i in range(len(rows_of(results)))]
    common += ["--workers", 0]
    assert label(*common, "--out", tmp_path / "stopped") == label(*common, "--out", tmp_path / "whole") == 0
    assert results.read_bytes() == (tmp_path / "whole" / "results.jsonl").read_bytes()
    assert [row["id"] for row in rows_of(results)] == [f"{i:02}.png" for i in range(24)]


def strip_digits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with numbers that hold for any batch: other batches have differed by 2.6e-6 at most."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        if isinstance(value, list):
            return list(map(rounded, value))
        return pytest.approx(value, rel=0, abs=2e-5) if isinstance(value, float) else value

    return [rounded(row) for row in rows]


def test_batches_workers_and_shards_give_the_same_rows(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    assert label(photos, *FEW, "--out", tmp_path / "a", "--batch", 1, "--workers", 0) == 1
    expected = rows_of(tmp_path / "a" / "results.jsonl")
    assert [row["id"] for row in expected if "error" in row] == ["03.png"] * 2
    assert label(photos, *FEW, "--out", tmp_path / "b", "--batch", 4, "--workers", 2) == 1
    assert rows_of(tmp_path / "b" / "results.jsonl") == strip_digits(expected)
    capsys.readouterr()
    for part in range(1, 4):
        label(photos, *FEW, "--out", tmp_path / "c", "--shard", f"{part}/3", "--workers", 0)
    joined = [row for part in range(1, 4) for row in rows_of(tmp_path / "c" / f"results.{part}-of-3.jsonl")]
    assert sorted(joined, key=lambda row: row["id"]) == strip_digits(expected)
    assert "03.png" in capsys.readouterr().err


def test_errors_are_tried_again_and_order_is_kept(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    common = [photos, *FEW, "--out", tmp_path / "out", "--workers", 0]
    (photos / "a.heic").touch()
    assert label(*common) == 1
    errors = capsys.readouterr().err
    assert "2 of 24 answers failed" in errors and "1 file was passed over" in errors and "Convert HEIC" in errors
    make_picture(3, 40, 30).save(photos / "03.png")
    assert label(*common) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "holds the first 6 answers already" in captured.err
    rows = rows_of(tmp_path / "out" / "results.jsonl")
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows) and len(rows) == 24
    assert not any("error" in row for row in rows)
    stored = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert label(*common, "--model", "nano") == 0 and (tmp_path / "out" / "results.jsonl").read_bytes() == stored


@pytest.mark.release
def test_hostile_files_cost_their_own_rows(photos: Path, tmp_path: Path) -> None:
    """The rest is as without them."""
    sound = [photos / f"{number:02}.png" for number in (0, 1, 2)]
    common = [*FEW[2:], "--batch", 1, "--workers", 1]
    assert label(*sound, *common, "--out", tmp_path / "sound") == 0
    os.mkfifo(photos / "01a.jpg")
    (photos / "01b.jpg").mkdir()
    Image.new("1", (20_000, 20_000)).save(photos / "01c.png")
    hostile = [photos / name for name in ("01a.jpg", "01c.png", "03.png", "absent.png")]
    mixed = sorted([*sound, *hostile], key=lambda path: path.name)
    assert label(*mixed, photos / "01b.jpg", *common, "--out", tmp_path / "mixed") == 2  # a folder without images
    assert label(*mixed, *common, "--out", tmp_path / "mixed") == 1
    rows = rows_of(tmp_path / "mixed" / "results.jsonl")
    assert [row["id"] for row in rows if "error" in row] == [path.name for path in hostile]
    assert [row for row in rows if "error" not in row] == rows_of(tmp_path / "sound" / "results.jsonl")


def test_a_changed_image_is_answered_again(photos: Path, tmp_path: Path) -> None:
    common = [photos / "00.png", photos / "01.png", *FEW, "--out", tmp_path / "out", "--workers", 0]
    assert label(*common) == 0
    before = rows_of(tmp_path / "out" / "results.jsonl")
    make_picture(77, 60, 50).save(photos / "00.png")
    assert label(*common) == 0
    after = rows_of(tmp_path / "out" / "results.jsonl")
    assert len(after) == 4 and after[0]["image_size"] == [60, 50] and after[2:] == before[2:]


def test_a_changed_image_in_a_tar_is_answered_again(photos: Path, tmp_path: Path) -> None:
    def pack(first: str) -> None:
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for name, file in (("a.png", first), ("b.png", "01.png")):
                tar.add(photos / file, name)

    common = [tmp_path / "0.tar", *FEW, "--out", tmp_path / "out", "--workers", 0]
    pack("00.png")
    assert label(*common) == 0
    before = rows_of(tmp_path / "out" / "results.jsonl")
    make_picture(77, 60, 50).save(photos / "02.png")
    pack("02.png")
    assert label(*common) == 0
    after = rows_of(tmp_path / "out" / "results.jsonl")
    assert len(after) == 4 and after[0]["image_size"] == [60, 50] and after[2:] == before[2:]


def test_a_hopeless_run_ends_early(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    for number in range(12):
        (photos / f"{number:02}.png").write_text("not an image")
    assert label(photos, *FEW, "--out", tmp_path / "out", "--max-errors", 3, "--workers", 0) == 1
    assert "ended early, because --max-errors was exceeded" in capsys.readouterr().err
    assert 4 <= len(rows_of(tmp_path / "out" / "results.jsonl")) < 24


def test_a_stopped_run_can_be_put_in_order(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--compact` needs no model."""
    common = [*FEW, "--out", tmp_path / "out", "--workers", 0]
    assert label(photos / "05.png", *common) == label(photos / "01.png", *common) == 0
    monkeypatch.setattr(Labelling, "_answer", None)
    assert label(photos / "01.png", photos / "05.png", *common, "--compact") == 0
    assert [row["id"] for row in rows_of(tmp_path / "out" / "results.jsonl")] == ["01.png"] * 2 + ["05.png"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "out"], "Which task?"),
        (["--out", "out", "--text", "x"], "--text needs --task"),
        (["--out", "out", "--task", "<FLY>"], "Unknown task <FLY>"),
        (["--out", "out", "--task", "od", "--batch", "0"], "--batch is 0"),
        (["--out", "out", "--task", "od", "--workers", "-1"], "--workers is -1"),
        (["--out", "out", "--task", "od", "--model", "nanoo"], "nanoo"),
        (["--out", "out", "--task", "od", "--device", "cuda", "--devices", "cpu,cpu"], "leave one out"),
    ],
)
def test_wrong_words_are_a_sentence(
    words: list[str], message: str, photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert label(photos, "--model", "nano", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--shard", "0/3"],
        ["--shard", f"1/{'9' * 5000}"],
        ["--shard", "4/3"],
        ["--max-errors", "x"],
        ["--max-errors", "101%"],
    ],
)
def test_words_that_do_not_parse(words: list[str], photos: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        label(photos, "--out", "out", "--task", "od", *words)
    assert f"'{words[1][:40]}' is not a" in capsys.readouterr().err


def test_a_further_folder_does_not_change_which_images_are_finished(tmp_path: Path, capfd: Capture) -> None:
    """The ids of images depend on all arguments, their places do not."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make_picture(1, 40, 30).save(tmp_path / name / "x.png")
    common = (*FEW[2:], "--workers", 0, "--out", tmp_path / "out")
    assert label(tmp_path / "a", *common) == 0
    first = rows_of(tmp_path / "out" / "results.jsonl")
    assert label(tmp_path / "a", tmp_path / "b", *common) == 0
    rows = rows_of(tmp_path / "out" / "results.jsonl")
    assert rows[0] == first[0] and [row["id"] for row in rows] == ["x.png", "b/x.png"]
