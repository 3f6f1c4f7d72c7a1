"""The command, from files in the official layouts through the answers of nano to the report."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from florence2.cli.main import main
from florence2.evaluate.command import _splits, names_table
from florence2.evaluate.tables.catalogue import TABLES, read_table
from florence2.label.devices import split_options
from recipes.nano.scenes import Scene, make_scene
from tests.evaluate.conftest import SEED

Capture = pytest.CaptureFixture[str]
SPLITS = ["nocaps", "textcaps", "coco-caption", "coco-detection", "flickr30k", "refcoco:testA", "refcoco+:testA"]
SPLITS += ["refcocog:test", "refcoco-res:testA", "vqav2", "textvqa", "vizwiz"]
NANO = ["--model", "nano", "--device", "cpu", "--beams", "1", "--workers", "0"]


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def answered(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run over all tables, two images each."""
    out = tmp_path_factory.mktemp("out")
    assert evaluate(*SPLITS, "--data", data, "--out", out, "--limit", 2, *NANO) == 0
    return out


def results(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = json.loads((out / "report.json").read_text())["results"]
    return {(row["table"].partition(":")[0], row["metric"], row["protocol"].partition(", ")[2]): row for row in rows}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def overlap(first: list[float], second: list[float]) -> float:
    """IoU of two boxes, written down again."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared)


def scene_of(row: dict[str, Any]) -> Scene:
    stem = Path(row["id"]).stem.rpartition("_")[2]
    return make_scene(SEED, int(stem, 16 if len(stem) == 16 else 10))


def named(row: dict[str, Any]) -> Any:
    """The thing that an expression names."""
    return next(thing for thing in scene_of(row).things if row["input"].endswith(thing.phrase))


def test_every_table_has_results(answered: Path) -> None:
    found = results(answered)
    assert {name for name, *_ in found} == set(TABLES)
    assert all(row["unanswered"] == 0 and 1 <= row["images"] <= 2 for row in found.values())
    assert found["coco-detection", "mAP", "model"]["value"] > 80
    assert found["nocaps", "CIDEr", ""]["value"] > 300
    assert found["refcoco-res", "mIoU", ""]["value"] > 50
    text = (answered / "report.md").read_text()
    assert "| refcoco:testA | accuracy |" in text
    assert "- weights: 6a55" in text
    assert "- dtype: float32\n" in text
    assert "- beams: 1\n" in text
    assert "- device: cpu\n" in text


@pytest.mark.parametrize("table", ["refcoco:testA", "refcoco+:testA", "refcocog:test"])
def test_accuracy_is_that_of_a_script(table: str, answered: Path) -> None:
    rights = [
        bool(row["boxes"]) and overlap(row["boxes"][0]["xyxy"], list(named(row).box)) >= 0.5
        for row in rows_of(answered / table.replace(":", "-"))
    ]
    value = results(answered)[table.partition(":")[0], "accuracy", ""]
    assert value["value"] == pytest.approx(100 * sum(rights) / len(rights))
    assert value["examples"] == len(rights)
    assert value["value"] > 40  # nano was not trained on expressions with an article


def test_masks_are_those_of_a_script(answered: Path) -> None:
    ious = []
    for row in rows_of(answered / "refcoco-res-testA"):
        width, height = row["image_size"]
        outline = [value for point in named(row).outline for value in point]
        given = [ring for polygon in row["polygons"] for ring in polygon["rings"] if len(ring) > 4]
        both = [mask.merge(mask.frPyObjects(rings, height, width)) for rings in ([outline], given) if rings]
        ious.append(float(mask.iou(both[:1], both[1:], [0])[0, 0]) if given else 0.0)
    # the files hold outlines with two digits
    assert results(answered)["refcoco-res", "mIoU", ""]["value"] == pytest.approx(100 * np.mean(ious), abs=0.5)


def test_phrases_are_those_of_a_script(answered: Path, data: Path) -> None:
    given = {(Path(row["id"]).stem, row["input"]): row for row in rows_of(answered / "flickr30k-test")}
    rights = []
    for example in read_table("flickr30k", data):
        row = given.get((example.image.stem, example.text))
        for phrase in example.truth.phrases if row else ():
            found = [box["xyxy"] for box in row["boxes"] if box["label"] == phrase.words]
            rights.append(bool(found) and overlap(found[0], phrase.boxes[0]) >= 0.5)
    value = results(answered)["flickr30k", "R@1", "any-box"]
    assert value["value"] == pytest.approx(100 * sum(rights) / len(rights))
    assert value["examples"] == len(rights)


def test_submissions(answered: Path) -> None:
    rows = json.loads((answered / "vqav2-val" / "submission.json").read_text())
    assert [row["question_id"] for row in rows] == [1001, 1002]
    assert all(row["answer"] for row in rows)
    rows = json.loads((answered / "vizwiz-val" / "submission.json").read_text())
    assert [row["image"] for row in rows] == ["VizWiz_val_00000001.jpg", "VizWiz_val_00000002.jpg"]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("florence2.loading.load", refuse)


@pytest.mark.usefixtures("no_model")
def test_scores_again_without_the_model(answered: Path, data: Path) -> None:
    before, rows = results(answered), rows_of(answered / "refcoco-testA")
    assert evaluate(*SPLITS, "--data", data, "--out", answered, "--limit", 2, "--score") == 0
    assert results(answered) == before
    assert evaluate(*SPLITS, "--data", data, "--out", answered, "--limit", 2, *NANO) == 0  # nothing is left
    assert results(answered) == before
    assert rows_of(answered / "refcoco-testA") == rows


def test_a_second_protocol_asks_only_what_it_adds(data: Path, tmp_path: Path, capsys: Capture) -> None:
    common = ["refcoco:testA", "--data", data, "--out", tmp_path, "--limit", 1, *NANO]
    assert evaluate(*common) == 0
    first = rows_of(tmp_path / "refcoco-testA")
    assert evaluate(*common, "--protocol", "ovd-then-grounding") == 0
    second = rows_of(tmp_path / "refcoco-testA")
    assert len(second) == 2 * len(first)
    assert all(row in second for row in first)
    assert results(tmp_path).keys() == {("refcoco", "accuracy", "")}
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["protocol"] == "ovd-then-grounding"
    capsys.readouterr()
    assert evaluate(*common, "--protocol", "grounding", "--score") == 0
    assert "grounding" in capsys.readouterr().out


def test_shards_and_images_that_are_missing(data: Path, tmp_path: Path, capsys: Capture) -> None:
    for path in ("nocaps/val", "out"):
        (tmp_path / path).mkdir(parents=True)
    for name in ("nocaps/nocaps_val_4500_captions.json", *(f"nocaps/val/{i:016x}.jpg" for i in (1, 3))):
        (tmp_path / name).symlink_to(data / name)
    common = ["nocaps", "--data", tmp_path, "--out", tmp_path / "out", "--limit", 3]
    assert evaluate(*common, *NANO, "--shard", "1/2") == 0
    assert not (tmp_path / "out" / "report.json").exists()
    assert evaluate(*common, *NANO, "--shard", "2/2") == 1  # the second image is missing
    capsys.readouterr()
    assert evaluate(*common, "--score", "--json") == 1
    (whole, *_) = json.loads(capsys.readouterr().out)["results"]
    assert (whole["examples"], whole["images"], whole["unanswered"]) == (3, 3, 1)
    assert whole["value"] > 100


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Which table or data file? Tables: coco-caption, "),
        (["refcoco"], "Tables need --data DIR, their files."),
        (["refcoco", "--data", "."], "Tables need --out DIR, for the answers."),
        (["refcoco", "--data", ".", "--out", "out"], "does not exist; its owners publish it"),
        (["refcoco", "--data", ".", "--out", "out", "--protocol", "x"], "Known protocols: ovd, ovd-then-grounding, "),
        (["refcoco:x", "--data", ".", "--out", "out"], "refcoco has no split 'x'."),
        (["refcoco", "--task", "od"], "--task goes with a data file"),
        (["refcoco", "coco", "--data", ".", "--out", "out"], "Unknown table 'coco'. Known tables: "),
        (["coco", "--data", "."], "Unknown table 'coco'. Known tables: "),
        (["data.jsonl", "--data", "."], "--data goes with tables: 'data.jsonl' is a data file"),
        (["data.jsonl", "more.jsonl"], "'more.jsonl' is one file too many: 'data.jsonl' is a data file"),
        (["refcoco", "--data", ".", "--out", "out", "--score", "--shard", "1/2"], "leave --shard out."),
        (["refcoco", "--data", ".", "--out", "out", "--limit", "0"], "--limit is 0; it must be at least 1."),
        (["refcoco", "--data", ".", "--out", "out", "--workers", "-1"], "--workers is -1; it must be at least 0."),
        (["refcoco", "--data", ".", "--out", "out", "--device", "cpu", "--devices", "cpu"], "leave one out."),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_wrong_words(
    words: list[str], sentence: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").touch()
    assert evaluate(*words) == 2
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_a_run_that_was_stopped_ends_with_the_same_report(answered: Path, data: Path, tmp_path: Path) -> None:
    common = ["nocaps", "--data", data, "--out", tmp_path, *NANO]
    assert evaluate(*common, "--limit", 1) == 0
    first = rows_of(tmp_path / "nocaps-val")
    assert evaluate(*common, "--limit", 2) == 0
    assert rows_of(tmp_path / "nocaps-val")[:1] == first  # with its time and all digits: it was not answered again
    whole = {key: row for key, row in results(answered).items() if key[0] == "nocaps"}
    again = results(tmp_path)
    assert {key: row["value"] for key, row in again.items()} == {
        key: pytest.approx(row["value"]) for key, row in whole.items()
    }


def test_all_splits() -> None:
    every = _splits(["all"])
    assert {"coco-caption:test", "refcoco:testB", "vqav2:test-dev", "vqav2:val", "textvqa:val"} <= set(every)
    assert len(every) == len(set(every)) == 18
    assert _splits(["refcoco", "refcoco:val", "refcoco:testA"]) == ["refcoco:val", "refcoco:testA"]


def test_devices(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each does its part of the images; processes are tested with those of `florence2 label`."""

    def one_after_the_other(options: argparse.Namespace, answer: Callable[[argparse.Namespace], int]) -> int:
        return max(map(answer, split_options(options)))

    monkeypatch.setattr("florence2.evaluate.command.label_on_devices", one_after_the_other)
    common = ["nocaps", "--data", data, "--out", tmp_path, *NANO, "--limit", 3]
    assert evaluate(*common, "--device", "auto", "--devices", "cpu,cpu") == 0
    names = sorted(path.name for path in (tmp_path / "nocaps-val").glob("*.jsonl"))
    assert names == ["results.1-of-2.jsonl", "results.2-of-2.jsonl"]
    assert results(tmp_path)["nocaps", "CIDEr", ""]["unanswered"] == 0


def test_damaged_rows_count_as_unanswered(answered: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(answered / "refcoco-testA", tmp_path / "refcoco-testA")
    file = tmp_path / "refcoco-testA" / "results.jsonl"
    lines = file.read_text().splitlines()
    spoilt = json.loads(lines[0]) | {"boxes": [{"xyxy": [1, 2, "x"], "label": 5}]}
    file.write_text("\n".join([json.dumps(spoilt), lines[1][:50], *lines[2:]]) + "\n")
    common = ["refcoco:testA", "--data", data, "--out", tmp_path, "--limit", 2, "--score", "--json"]
    assert evaluate(*common) == 1
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["unanswered"], result["examples"]) == (2, len(lines))


def test_scores_without_answers(data: Path, tmp_path: Path, capsys: Capture) -> None:
    assert evaluate("nocaps", "--data", data, "--out", tmp_path, "--score") == 2
    assert "nocaps-val holds no answers; leave --score out" in capsys.readouterr().err


def test_the_list(capsys: Capture) -> None:
    assert evaluate("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("\t")[0].partition(":")[0] for line in lines} == set(TABLES)
    assert evaluate("--list", "vizwiz") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t")[:2] == ["vizwiz:val", "vizwiz/val.json"]
    assert len(lines) == 4


def test_a_file_with_the_name_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    is_table: Callable[[str], bool] = names_table
    assert is_table("refcoco:val")
    assert is_table("all")
    assert not is_table("data.jsonl")
    Path("refcoco").touch()
    assert not is_table("refcoco")
