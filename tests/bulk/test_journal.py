"""An output folder: finished work is not repeated, settings do not mix, drawings are not overwritten."""

import json
from pathlib import Path

import pytest

import florence2
from florence2.bulk.journal import Folder
from florence2.bulk.rows import Row, TaskQuestion, row_key
from florence2.bulk.sources import Source, find_images
from florence2.errors import OptionError
from florence2.inputs.image import open_image
from tests.bulk.conftest import Answering


def test_finished_work_is_not_repeated(album: Path, answer: Answering, tmp_path: Path) -> None:
    sources, questions = find_images([str(album)]), [TaskQuestion("<OD>"), TaskQuestion("<CAPTION>")]
    out = tmp_path / "out"
    with Folder(out, draw=False, settings={}) as folder:
        for row in answer(sources, questions)[:7]:  # three images, one of them bad, and half of the fourth
            folder(row)
    with (out / "results.jsonl").open("a") as file:
        file.write('{"image": "half a li')
    with Folder(out, draw=False, settings={}) as again:
        left = answer(sources, questions, done=again.done)
        for row in left:
            again(row)
    assert len(again.done) == 5  # without the two failures
    assert [(row.source.stem, row.question.name) for row in left] == [
        ("c", "<OD>"),
        ("c", "<CAPTION>"),
        ("d", "<CAPTION>"),
        ("deeper/a", "<OD>"),
        ("deeper/a", "<CAPTION>"),
    ]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 10 == len({row_key(row) for row in rows}) and sum("error" in row for row in rows) == 2


def test_another_input_is_other_work(album: Path, answer: Answering, tmp_path: Path) -> None:
    sources = find_images([str(album / "a.png")])
    with Folder(tmp_path / "out", draw=False, settings={}) as folder:
        for row in answer(sources, [TaskQuestion("<OPEN_VOCABULARY_DETECTION>", "cat")]):
            folder(row)
    with Folder(tmp_path / "out", draw=False, settings={}) as again:
        done = again.done
    assert answer(sources, [TaskQuestion("<OPEN_VOCABULARY_DETECTION>", "cat")], done=done) == []
    assert len(answer(sources, [TaskQuestion("<OPEN_VOCABULARY_DETECTION>", "dog")], done=done)) == 1


def test_one_folder_has_one_kind_of_answers(small: florence2.Florence2, picture_file: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with Folder(tmp_path / "out", draw=False, settings={"model": "base", "beams": None}) as folder:
            folder(row_with_a_box(small, picture_file))
    with pytest.raises(OptionError, match=r"beams was None and is 5\); choose another folder"):
        Folder(tmp_path / "out", draw=False, settings={"model": "base", "beams": 5})


def test_failures_do_not_lock_a_folder(tmp_path: Path) -> None:
    """Where nothing was answered, no answers can be mixed."""
    for beams in (None, 5):
        with Folder(tmp_path, draw=False, settings={"beams": beams}) as folder:
            folder(Row(Source("a.png", Path("a.png"), "a"), TaskQuestion("<OD>"), error="bad"))
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_a_folder_without_answers_takes_new_settings(tmp_path: Path) -> None:
    """A misspelt model must not make its folder useless."""
    for model in ("bsae", "base"):
        with Folder(tmp_path, draw=False, settings={"model": model}):
            pass
    assert json.loads((tmp_path / "settings.json").read_text()) == {"model": "base"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OptionError, match="out is a file; answers need a folder"):
        Folder(tmp_path / "out", draw=False, settings={})
    assert (tmp_path / "out").read_text() == "mine"


def row_with_a_box(small: florence2.Florence2, path: Path, task: str = "<OD>") -> Row:
    text = "a café<loc_100><loc_200><loc_700><loc_800>"
    answer = small.processor.answer(task, text, image_size=open_image(path).size)
    return Row(Source(str(path), path, "sub/photo"), TaskQuestion(task), answer)


def test_answers_with_regions_are_drawn(small: florence2.Florence2, picture_file: Path, tmp_path: Path) -> None:
    with Folder(tmp_path / "out", draw=True, settings={}) as folder:
        folder(row_with_a_box(small, picture_file))
        folder(row_with_a_box(small, picture_file, "<CAPTION>"))
        folder(Row(Source("x", picture_file, "x"), TaskQuestion("<OD>"), error="bad"))
    drawn = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert drawn == ["sub/photo.od.png"]
    with Folder(tmp_path / "out", draw=True, settings={}) as folder:
        folder(row_with_a_box(small, picture_file))
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row.get("drawing") for row in rows] == ["sub/photo.od.png", None, "sub/photo.od-2.png"]
    assert open_image(tmp_path / "out" / "sub" / "photo.od.png").size == open_image(picture_file).size
