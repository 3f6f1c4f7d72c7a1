"""Many pictures: errors stay with their picture, stopped work goes on."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

import florence2
from florence2.batch import (
    CASCADE,
    Console,
    Folder,
    Progress,
    Question,
    Row,
    Source,
    answer_pictures,
    find_pictures,
    row_key,
)
from florence2.errors import ImageError
from florence2.image import open_image
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


def test_an_empty_folder_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no pictures"):
        find_pictures([str(tmp_path)])


def test_stdin(monkeypatch: pytest.MonkeyPatch, picture_file: Path) -> None:
    class Stdin:
        buffer = io.BytesIO(picture_file.read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin)
    (source,) = find_pictures(["-"])
    assert source.data == picture_file.read_bytes() and source.stem == "stdin"
    monkeypatch.setattr("florence2.batch.MAX_STDIN_BYTES", 10)
    Stdin.buffer.seek(0)
    with pytest.raises(ImageError, match="stdin has more than"):
        find_pictures(["-"])


def test_one_bad_picture_costs_its_own_rows(small: florence2.Florence2, album: Path) -> None:
    rows = answer(small, find_pictures([str(album)]), [Question("<OD>"), Question("<CAPTION>")])
    assert len(rows) == 10
    failed = [row for row in rows if row.error]
    assert [row.source.stem for row in failed] == ["c", "c"] and "is no picture" in (failed[0].error or "")
    alone = small.run("<OD>", album / "d.png", options=small.options(max_new_tokens=6))
    (found,) = [row.answer for row in rows if row.source.stem == "d" and row.question.task == "<OD>"]
    assert isinstance(found, florence2.Answer) and found.token_ids == alone.token_ids


def test_a_box_outside_one_picture_fails_there_alone(small: florence2.Florence2, tmp_path: Path) -> None:
    for name, width in (("wide.png", 100), ("slim.png", 20)):
        make_picture(1, width, 50).save(tmp_path / name)
    rows = answer(small, find_pictures([str(tmp_path)]), [Question("<REGION_TO_OCR>", (30, 5, 60, 20))])
    assert [(row.source.stem, row.error is None) for row in rows] == [("slim", False), ("wide", True)]
    assert "outside the picture of 20 x 50" in (rows[0].error or "")


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
    assert rows[4] == {"image": "absent.png", "task": "<OD>", "error": "absent.png does not exist."}
    assert all(json.loads(json.dumps(row)) for row in rows)


def test_finished_work_is_not_done_again(small: florence2.Florence2, album: Path, tmp_path: Path) -> None:
    sources, questions = find_pictures([str(album)]), [Question("<OD>"), Question("<CAPTION>")]
    out = tmp_path / "out"
    with Folder(out, draw=False) as folder:
        for i, row in enumerate(answer_pictures(small, sources, questions, small.options(max_new_tokens=6), 1)):
            folder(row)
            if i == 6:
                break  # stopped after three pictures (one of them bad) and one of two questions on the fourth
    with (out / "results.jsonl").open("a") as file:
        file.write('{"image": "half a li')
    with Folder(out, draw=False) as again:
        left = answer(small, sources, questions, done=again.done)
        for row in left:
            again(row)
    assert len(again.done) == 5  # without the two failures
    assert [(row.source.stem, row.question.task) for row in left] == [
        ("c", "<OD>"),
        ("c", "<CAPTION>"),
        ("d", "<CAPTION>"),
        ("deeper/a", "<OD>"),
        ("deeper/a", "<CAPTION>"),
    ]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 10 == len({row_key(row) for row in rows}) and sum("error" in row for row in rows) == 2


def test_another_input_is_other_work(small: florence2.Florence2, album: Path, tmp_path: Path) -> None:
    sources = find_pictures([str(album / "a.png")])
    with Folder(tmp_path / "out", draw=False) as folder:
        for row in answer(small, sources, [Question("<OPEN_VOCABULARY_DETECTION>", "cat")]):
            folder(row)
    with Folder(tmp_path / "out", draw=False) as again:
        done = again.done
    assert answer(small, sources, [Question("<OPEN_VOCABULARY_DETECTION>", "cat")], done=done) == []
    assert len(answer(small, sources, [Question("<OPEN_VOCABULARY_DETECTION>", "dog")], done=done)) == 1


def row_with_a_box(small: florence2.Florence2, path: Path, task: str = "<OD>") -> Row:
    text = "a café<loc_100><loc_200><loc_700><loc_800>"
    found = small.processor.answer(task, text, image_size=open_image(path).size)
    return Row(Source(str(path), path, "sub/photo"), Question(task), found)


def test_pictures_are_drawn_where_there_is_something_to_draw(
    small: florence2.Florence2, picture_file: Path, tmp_path: Path
) -> None:
    with Folder(tmp_path / "out", draw=True) as folder:
        folder(row_with_a_box(small, picture_file))
        folder(row_with_a_box(small, picture_file, "<CAPTION>"))
        folder(Row(Source("x", picture_file, "x"), Question("<OD>"), error="bad"))
    drawn = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert drawn == ["sub/photo.od.png"]
    assert open_image(tmp_path / "out" / "sub" / "photo.od.png").size == open_image(picture_file).size


def test_console(small: florence2.Florence2, picture_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = row_with_a_box(small, picture_file)
    Console(as_json=True, headings=True)(row)
    assert json.loads(capsys.readouterr().out)["boxes"][0]["label"] == "a café"
    Console(as_json=False, headings=True)(row)
    out = capsys.readouterr().out
    assert out.startswith(f"== {picture_file}  <OD>\na café  ")
    Console(as_json=False, headings=False)(Row(row.source, row.question, error="something"))
    captured = capsys.readouterr()
    assert captured.out == "" and "something" in captured.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    terminal, log, single = Terminal(), io.StringIO(), Terminal()
    shows = [Progress(4000, terminal), Progress(4000, log), Progress(1, single)]
    for finished, seconds in ((1, 2.0), (2, 2.0), (10, 36.0)):
        now[0] += seconds
        for show in shows:
            show.show(finished)
    for show in shows:
        show.close()
    assert terminal.getvalue().count("\r") == 3 and terminal.getvalue().endswith("\n")
    assert log.getvalue() == "10/4000 pictures, 4.00 s each, 4:26:00 left\n"
    assert single.getvalue() == ""
