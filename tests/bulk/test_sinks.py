"""Where rows go: stopped work goes on, settings do not mix, drawings are not overwritten."""

import io
import json
from pathlib import Path

import pytest

import florence2
from florence2.bulk.batch import CASCADE, Question, Row, Source, answer_pictures, find_pictures, row_key
from florence2.bulk.sinks import Console, Folder, Progress
from florence2.errors import OptionError
from florence2.inputs.image import open_image
from tests.bulk.test_batch import album, answer

__all__ = ["album"]


def test_finished_work_is_not_done_again(small: florence2.Florence2, album: Path, tmp_path: Path) -> None:
    sources, questions = find_pictures([str(album)]), [Question("<OD>"), Question("<CAPTION>")]
    out = tmp_path / "out"
    with Folder(out, draw=False, settings={}) as folder:
        for i, row in enumerate(answer_pictures(small, sources, questions, small.options(max_new_tokens=6), 1)):
            folder(row)
            if i == 6:
                break  # stopped after three pictures (one of them bad) and one of two questions on the fourth
    with (out / "results.jsonl").open("a") as file:
        file.write('{"image": "half a li')
    with Folder(out, draw=False, settings={}) as again:
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
    with Folder(tmp_path / "out", draw=False, settings={}) as folder:
        for row in answer(small, sources, [Question("<OPEN_VOCABULARY_DETECTION>", "cat")]):
            folder(row)
    with Folder(tmp_path / "out", draw=False, settings={}) as again:
        done = again.done
    assert answer(small, sources, [Question("<OPEN_VOCABULARY_DETECTION>", "cat")], done=done) == []
    assert len(answer(small, sources, [Question("<OPEN_VOCABULARY_DETECTION>", "dog")], done=done)) == 1


def test_what_makes_work_the_same(tmp_path: Path) -> None:
    """The place of a picture, not its name; the bytes of stdin; a cascade's detail."""
    one, other = Source("a.jpg", Path("x/a.jpg"), "a"), Source("a.jpg", Path("y/a.jpg"), "a")
    pipes = [Source("-", data, "stdin") for data in (b"1", b"2", b"1")]
    question = Question("od")
    assert Row(one, question).key != Row(other, question).key
    keys = [Row(pipe, question).key for pipe in pipes]
    assert keys[0] == keys[2] != keys[1]
    details = {Row(one, Question(CASCADE, detail=detail)).key for detail in ("short", "detailed")}
    assert len(details) == 2
    assert row_key(json.loads(json.dumps(Row(one, question, error="e").to_dict()))) == Row(one, question).key


def test_one_folder_has_one_kind_of_answers(tmp_path: Path) -> None:
    for settings in ({"model": "base", "beams": None}, {"model": "base", "beams": None}):
        with Folder(tmp_path, draw=False, settings=settings):
            pass
    with pytest.raises(OptionError, match=r"beams was None and is 5\); choose another folder"):
        Folder(tmp_path, draw=False, settings={"model": "base", "beams": 5})


def row_with_a_box(small: florence2.Florence2, path: Path, task: str = "<OD>") -> Row:
    text = "a café<loc_100><loc_200><loc_700><loc_800>"
    found = small.processor.answer(task, text, image_size=open_image(path).size)
    return Row(Source(str(path), path, "sub/photo"), Question(task), found)


def test_pictures_are_drawn_where_there_is_something_to_draw(
    small: florence2.Florence2, picture_file: Path, tmp_path: Path
) -> None:
    with Folder(tmp_path / "out", draw=True, settings={}) as folder:
        folder(row_with_a_box(small, picture_file))
        folder(row_with_a_box(small, picture_file, "<CAPTION>"))
        folder(Row(Source("x", picture_file, "x"), Question("<OD>"), error="bad"))
    drawn = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert drawn == ["sub/photo.od.png"]
    with Folder(tmp_path / "out", draw=True, settings={}) as folder:
        folder(row_with_a_box(small, picture_file))
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row.get("drawing") for row in rows] == ["sub/photo.od.png", None, "sub/photo.od-2.png"]
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


def test_json_is_json_on_any_terminal(
    small: florence2.Florence2, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", stream)
    row = Row(Source("日本é😀.png", picture_file, "x"), Question("<OD>"), error="x")
    Console(as_json=True, headings=False)(row)
    stream.flush()
    assert json.loads(stream.buffer.getvalue())["image"] == "日本é😀.png"  # type: ignore[attr-defined]


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
