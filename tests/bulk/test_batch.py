"""Many pictures: errors stay with their picture, stopped work goes on."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

import florence2
from florence2.bulk.batch import (
    CASCADE,
    Question,
    Row,
    Source,
    answer_pictures,
    find_pictures,
)
from florence2.errors import ImageError
from parity.recipe import make_picture
from tests.conftest import count_encodings


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Five files of which the third is no picture, and one in a folder below."""
    folder = tmp_path / "album"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "d.png", "deeper/a.png"):
        make_picture(len(name), 40, 30).save(folder / name)
    (folder / "c.png").write_text("no picture")
    (folder / "notes.txt").write_text("ignored")
    return folder


def answer(model: florence2.Florence2, sources: list[Source], questions: list[Question], **others: Any) -> list[Row]:
    options = model.options(max_new_tokens=6)
    return list(answer_pictures(model, sources, questions, options, **{"batch_size": 2, **others}))


def test_folders_files_and_names(album: Path) -> None:
    found = find_pictures([str(album), "absent.png"])
    assert [Path(source.name).name for source in found] == ["a.png", "b.jpg", "c.png", "d.png", "a.png", "absent.png"]
    assert [source.stem for source in found] == ["a", "b", "c", "d", "deeper/a", "absent"]


def test_equal_stems_are_numbered(album: Path) -> None:
    stems = [source.stem for source in find_pictures([str(album / "a.png"), str(album / "deeper" / "a.png")])]
    assert stems == ["a", "a-2"]
    names = [str(album / "a.png"), str(album / "deeper" / "a.png"), "x/a-2.png", "a.gif"]
    assert [source.stem for source in find_pictures(names)] == ["a", "a-2", "a-2-2", "a-3"]


def test_an_empty_folder_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no picture: no file ending in .jpg"):
        find_pictures([str(tmp_path)])


def test_stdin(monkeypatch: pytest.MonkeyPatch, picture_file: Path) -> None:
    class Stdin:
        buffer = io.BytesIO(picture_file.read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin)
    (source,) = find_pictures(["-"])
    assert source.data == picture_file.read_bytes() and source.stem == "stdin"
    monkeypatch.setattr("florence2.bulk.batch.MAX_STDIN_BYTES", 10)
    Stdin.buffer.seek(0)
    with pytest.raises(ImageError, match="stdin has more than"):
        find_pictures(["-"])


def test_one_bad_picture_costs_its_own_rows(small: florence2.Florence2, album: Path) -> None:
    rows = answer(small, find_pictures([str(album)]), [Question("<OD>"), Question("<CAPTION>")])
    assert len(rows) == 10
    failed = [row for row in rows if row.error]
    assert [row.source.stem for row in failed] == ["c", "c"] and "is not an image" in (failed[0].error or "")
    alone = small.run("<OD>", album / "d.png", options=small.options(max_new_tokens=6))
    (found,) = [row.answer for row in rows if row.source.stem == "d" and row.question.task == "<OD>"]
    assert isinstance(found, florence2.Answer) and found.token_ids == alone.token_ids


def test_a_box_outside_one_picture_fails_there_alone(small: florence2.Florence2, tmp_path: Path) -> None:
    for name, width in (("wide.png", 100), ("slim.png", 20)):
        make_picture(1, width, 50).save(tmp_path / name)
    rows = answer(small, find_pictures([str(tmp_path)]), [Question("<REGION_TO_OCR>", (30, 5, 60, 20))])
    assert [(row.source.stem, row.error is None) for row in rows] == [("slim", False), ("wide", True)]
    assert "outside the image of 20 x 50" in (rows[0].error or "")


def test_a_picture_is_encoded_once_for_all_questions(
    small: florence2.Florence2, album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_encodings(small, monkeypatch)
    questions = [Question("<OD>"), Question("<CAPTION>"), Question(CASCADE)]
    rows = answer(small, find_pictures([str(album / "a.png")]), questions)
    assert sum(calls) == 1 and [row.question for row in rows] == questions


def test_rows_as_json(small: florence2.Florence2, album: Path) -> None:
    questions = [
        Question("od"),
        Question("<OPEN_VOCABULARY_DETECTION>", ["a", "b"]),
        Question(CASCADE),
        Question("Where?"),
    ]
    rows = [row.to_dict() for row in answer(small, find_pictures([str(album / "a.png"), "absent.png"]), questions)]
    assert [row["task"] for row in rows] == ["<OD>", "<OPEN_VOCABULARY_DETECTION>", "cascade", "Where?"] * 2
    assert rows[1]["input"] == ["a", "b"] and rows[2]["caption"]["task"] == "<CAPTION>"
    assert rows[4]["image"] == "absent.png" and rows[4]["place"] == str(Path("absent.png").absolute())
    assert rows[4]["error"].startswith("absent.png does not exist") and rows[2]["detail"] == "short"
    assert all(json.loads(json.dumps(row)) for row in rows)
