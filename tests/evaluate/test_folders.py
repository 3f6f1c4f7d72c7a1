"""What may be in the folder of the answers: another run, another model, nothing, damage, a full disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from florence2.bulk.lock import FolderLock
from florence2.evaluate.running import commit_of, join_runs
from tests.evaluate.test_command import NANO, evaluate, results, rows_of
from tests.full_disk import files_of_at_most

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def answered(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answered")
    assert evaluate("nocaps", "vqav2", "--data", data, "--out", out, "--limit", 1, *NANO) == 0
    return out


@pytest.fixture
def out(answered: Path, tmp_path: Path) -> Path:
    """A copy of the answers, to be spoilt."""
    return Path(shutil.copytree(answered, tmp_path / "out"))


def score(data: Path, out: Path, *more: object) -> int:
    return evaluate("nocaps", "vqav2", "--data", data, "--out", out, "--limit", 1, "--score", *more)


def test_a_second_run_is_refused_while_the_first_one_writes(data: Path, out: Path, capsys: Capture) -> None:
    common = ["nocaps", "--data", data, "--out", out, "--limit", 2, *NANO]
    with FolderLock(out / "nocaps-val"):
        command = [sys.executable, "-m", "florence2", "evaluate", *map(str, common)]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"Another run is writing to {out}/nocaps-val; wait until it ends" in second.stderr
    assert "Traceback" not in second.stderr and len(rows_of(out / "nocaps-val")) == 1
    assert evaluate(*common) == 0
    assert "Another run" not in capsys.readouterr().err


def test_other_settings_or_another_model_are_refused(data: Path, out: Path, capsys: Capture) -> None:
    common = ["nocaps", "--data", data, "--out", out, "--limit", 2, "--device", "cpu", "--workers", "0"]
    assert evaluate(*common, "--model", "nano", "--beams", 2) == 2
    assert "holds answers made with other settings (beams was 1 and is 2)" in capsys.readouterr().err
    other = out.parent / "other"
    shutil.copytree(Path("weights/nano"), other)
    assert evaluate(*common, "--model", other, "--beams", 1) == 2
    assert "holds answers made with other settings (model was 'nano'" in capsys.readouterr().err
    assert len(rows_of(out / "nocaps-val")) == 1


def test_splits_that_were_answered_differently_have_no_common_report(data: Path, out: Path, capsys: Capture) -> None:
    settings = out / "vqav2-val" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"beams": 2}))
    (out / "report.json").unlink()
    assert score(data, out) == 2
    assert f"The splits in {out} were answered with different settings; measure them one by" in capsys.readouterr().err
    assert not (out / "report.json").exists()
    assert evaluate("vqav2", "--data", data, "--out", out, "--limit", 1, "--score") == 0


def test_each_split_remembers_how_it_was_answered(data: Path, out: Path) -> None:
    shutil.rmtree(out / "vqav2-val")
    common = ["--data", data, "--out", out, "--limit", 1]
    model = ["--model", "nano", "--device", "cpu", "--workers", "0", "--beams", "2", "--max-new-tokens", "9"]
    assert evaluate("vqav2", *common, *model) == 0
    for table, beams, tokens in (("nocaps", 1, 1024), ("vqav2", 2, 9)):
        assert evaluate(table, *common, "--score") == 0
        used = json.loads((out / "report.json").read_text())["computed"]
        assert (used["beams"], used["max_new_tokens"], used["device"]) == (beams, tokens, "cpu")
    kept = (out / "vqav2-val" / "run.json").read_bytes()
    assert evaluate("vqav2", *common, *model) == 0  # nothing is left
    assert (out / "vqav2-val" / "run.json").read_bytes() == kept


def test_the_commit_of_a_cached_checkpoint_is_reported(data: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--a--b" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(Path("weights/nano"), cached)
    model = ["--model", cached, "--device", "cpu", "--workers", "0", "--beams", "1"]
    assert evaluate("vqav2", "--data", data, "--out", tmp_path / "out", "--limit", 1, *model) == 0
    assert f"- revision: {cached.name}\n" in (tmp_path / "out" / "report.md").read_text()
    for other in (tmp_path / "snapshots" / "main", tmp_path / cached.name):
        assert commit_of(other) is None


def test_what_several_splits_were_answered_with() -> None:
    runs = [{"device": "cpu", "beams": 3, "seconds": 1.5}, {"device": "cuda:0", "beams": 3, "seconds": 2}]
    assert join_runs(runs) == {"device": "cpu and cuda:0", "beams": 3, "seconds": 3.5}
    assert join_runs([{"beams": [1], "seconds": "x"}]) == {"beams": [1], "seconds": "x"}
    assert join_runs([{"revision": "a", "beams": 1}, {"beams": 1}]) == {"revision": "a", "beams": 1}
    assert join_runs([]) == {}


def test_a_protocol_that_was_never_asked_has_no_result(data: Path, out: Path, capsys: Capture) -> None:
    before = results(out)
    command = ["nocaps", "--data", data, "--out", out, "--limit", 1, "--score", "--protocol", "detailed"]
    assert evaluate(*command) == 2
    assert "nocaps-val holds no answers by the protocol detailed; leave --score out" in capsys.readouterr().err
    assert results(out) == before


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("nocaps-val/settings.json", None, "nocaps-val holds no answers; leave --score out"),
        ("nocaps-val/settings.json", "[1]", "settings.json must hold a JSON object, not [1]"),
        ("nocaps-val/settings.json", "{", "settings.json cannot be read as JSON"),
        ("nocaps-val/results.jsonl", None, "nocaps-val holds no answers; leave --score out"),
        ("nocaps-val/results.jsonl", "", "nocaps-val holds no answers by the protocol caption"),
        ("nocaps-val/results.jsonl", '{"a": 1}\nnull\n[[[\n', "nocaps-val holds no answers by the protocol caption"),
        ("nocaps-val/run.json", "[", "run.json cannot be read as JSON"),
    ],
)
def test_damage(file: str, content: str | None, words: str, data: Path, out: Path, capsys: Capture) -> None:
    if content is None:
        (out / file).unlink()
    else:
        (out / file).write_text(content)
    assert score(data, out) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"boxes": [{"xyxy": [1, 2, 3, 4], "label": 5}]},
        {"boxes": [{"xyxy": [1, 2, 3, 4], "label": "circle", "score": "high"}]},
        {"boxes": [{"xyxy": [1, 2, 3, 4], "label": "circle", "score": float("nan")}]},
        {"boxes": [{"xyxy": [1, 2, 3, float("nan")], "label": "circle"}]},
        {"boxes": [[1, 2, 3, 4]]},
        {"boxes": {"a": 1}},
        {"polygons": [{"rings": [[0, 0, 1e9, 0, 1e9, 1e9]], "label": ""}], "image_size": [1e9, 1e9]},
        {"image_size": None},
    ],
)
def test_damaged_answers_count_as_none(change: dict[str, Any], data: Path, tmp_path: Path, capsys: Capture) -> None:
    common = ["coco-detection", "--data", data, "--out", tmp_path, "--limit", 2]
    folder = tmp_path / "coco-detection-val2017"
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    rows = [
        {"image": id, "place": id, "id": id, "task": "<OD>", "kind": "regions", "text": "", "raw_text": ""}
        | {"image_size": [303, 247], "boxes": []}
        for id in (f"coco/val2017/{number:012d}.jpg" for number in (1, 2))
    ]
    rows[0] |= change
    (folder / "results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert evaluate(*common, "--score", "--json") == 1
    first = json.loads(capsys.readouterr().out)["results"][0]
    assert (first["unanswered"], first["examples"]) == (1, 2)


def test_images_that_are_links_pipes_or_junk(data: Path, tmp_path: Path, capsys: Capture) -> None:
    """Also below a folder whose name is not UTF-8."""
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    images = folder / "nocaps" / "val"
    shutil.copytree(data / "nocaps", folder / "nocaps")
    first, second, third, fourth, fifth = sorted(images.iterdir())[:5]
    for image in (first, second, third, fourth):
        image.unlink()
    first.symlink_to(data / "nocaps" / "val" / first.name)
    second.symlink_to("/dev/zero")
    os.mkfifo(third)
    fourth.symlink_to(fourth.name)
    fifth.write_text("junk")
    common = ["nocaps", "--data", folder, "--out", tmp_path / "out", *NANO, "--limit", 5]
    assert evaluate(*common) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "Missing images of nocaps:val: 3 of 5" in captured.err
    assert results(tmp_path / "out")["nocaps", "CIDEr", ""]["unanswered"] == 4


def test_a_disk_that_is_full(data: Path, tmp_path: Path, capsys: Capture) -> None:
    """What was written stays, and the same command ends the run when there is room."""
    common = ["nocaps", "--data", data, "--out", tmp_path, "--limit", 3, *NANO, "--batch", 1]
    with files_of_at_most(900):  # one row has about 550 bytes
        assert evaluate(*common) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "cannot be written" in error
    first = rows_of(tmp_path / "nocaps-val")
    assert len(first) == 1 and not (tmp_path / "report.json").exists()
    assert evaluate(*common) == 0
    assert rows_of(tmp_path / "nocaps-val")[0] == first[0] and len(rows_of(tmp_path / "nocaps-val")) == 3
    (tmp_path / "report.md").unlink()
    with files_of_at_most(10):
        assert evaluate(*common, "--score") == 2
    error = capsys.readouterr().err
    assert "report.json cannot be written: " in error and "Traceback" not in error
    assert not (tmp_path / "report.md").exists() and json.loads((tmp_path / "report.json").read_text())["results"]
