"""The command, from a data file to the metrics on stdout."""

import json
from pathlib import Path

import pytest

from florence2.errors import Florence2Error, OptionError
from florence2.evaluate.command import main
from parity.recipe import make_picture

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three images: the first with two questions, the others with one."""
    rows = []
    for i in range(3):
        make_picture(i, 100, 80).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "prefix": "<OD>", "suffix": "cat<loc_1><loc_2><loc_500><loc_600>"})
    rows.append({"image": "0.png", "prefix": "<CAPTION>", "suffix": "A cat."})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def given(data: Path, small_folder: Path) -> list[str]:
    return [str(data), "--model", str(small_folder), "--beams", "1", "--max-new-tokens", "12", "--device", "cpu"]


def test_a_table(given: list[str], capsys: Capture) -> None:
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["<CAPTION>", "1"], ["<OD>", "3"]]
    assert "exact_match 0.000" in lines[0] and "map_50_95 0.000" in lines[1]


def test_cut_answers_are_counted(given: list[str], capsys: Capture) -> None:
    """In the table, in JSON, and at the end; a limit that no answer reaches is not mentioned."""
    assert main([*given, "--max-new-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert [line.split("  ")[-1] for line in captured.out.splitlines()] == ["1 cut off", "3 cut off"]
    sentence = "4 of 4 answers were cut off at --max-new-tokens 2; a larger number gives the rest."
    assert captured.err == f"florence2: {sentence}\n"
    assert main([*given, "--max-new-tokens", "2", "--json"]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [(row["task"], row["cut_off"]) for row in rows] == [("<CAPTION>", 1), ("<OD>", 3)]
    assert captured.err == f"florence2: {sentence}\n"
    assert main([*given, "--max-new-tokens", "80"]) == 0
    captured = capsys.readouterr()
    assert "cut off" not in captured.out + captured.err


def test_json_of_the_first_images(given: list[str], capsys: Capture) -> None:
    assert main([*given, "--json", "--limit", "2", "--batch", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row["count"]) for row in rows] == [("<CAPTION>", 1), ("<OD>", 2)]
    assert rows[1].keys() >= {"map_50", "map_50_95", "precision", "recall", "f1"}


def test_a_coco_file_is_asked_what_one_likes(given: list[str], data: Path, capsys: Capture) -> None:
    rows = [{"id": i, "image_id": 1, "category_id": 1, "bbox": [10 * i, 5, 9, 9]} for i in range(3)]
    file = data.parent / "coco.json"
    values = {"images": [{"id": 1, "file_name": "0.png"}], "categories": [{"id": 1, "name": "cup"}]}
    file.write_text(json.dumps({**values, "annotations": rows}))
    for task, count in (("<OD>", 1), ("<REGION_TO_CATEGORY>", 3)):
        assert main([str(file), *given[1:], "--task", task, "--json"]) == 0
        assert [(row["task"], row["count"]) for row in map(json.loads, capsys.readouterr().out.splitlines())] == [
            (task, count)
        ]


def test_a_question_that_cannot_be_answered_costs_a_row(given: list[str], data: Path, capsys: Capture) -> None:
    """An image cut short has a size, but no pixels."""
    (data.parent / "1.png").write_bytes((data.parent / "1.png").read_bytes()[:2000])
    assert main([*given, "--json"]) == 1
    error, *rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert error["sample"] == "1.png (line 2)" and error["prefix"] == "<OD>" and "cannot be read" in error["error"]
    assert [(row["task"], row["count"]) for row in rows] == [("<CAPTION>", 1), ("<OD>", 2)]


def test_failures_go_to_stderr(given: list[str], data: Path, capsys: Capture) -> None:
    (data.parent / "0.png").write_bytes(b"not an image")
    assert main([*given, "--limit", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("florence2: 0.png") == 2 and captured.out == ""
    assert captured.err.endswith("florence2: 2 of 2 answers failed.\n")


@pytest.mark.parametrize("option", ["--batch", "--limit"])
def test_numbers_below_one_are_refused(given: list[str], option: str) -> None:
    with pytest.raises(OptionError, match=f"{option} is 0"):
        main([*given, option, "0"])


def test_a_data_file_that_does_not_exist(given: list[str]) -> None:
    with pytest.raises(Florence2Error, match=r"nowhere\.jsonl"):
        main(["nowhere.jsonl", *given[1:]])
