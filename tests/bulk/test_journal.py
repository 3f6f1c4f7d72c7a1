"""An output folder: finished work is not repeated, settings do not mix, drawings are not overwritten."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import florence2
from florence2.bulk.journal import Folder
from florence2.bulk.rows import Row, TaskQuestion, row_key
from florence2.bulk.sources import Source, find_images
from florence2.errors import OptionError
from florence2.inputs.image import open_image
from parity.recipe import make_picture
from tests.bulk.conftest import Answering
from tests.full_disk import files_of_at_most


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


def test_a_row_is_in_the_file_at_once_and_as_it_is(
    small: florence2.Florence2, picture_file: Path, tmp_path: Path
) -> None:
    """A process that is killed loses no row that was written, and letters stay readable."""
    with Folder(tmp_path / "out", draw=False, settings={}) as folder:
        for count in (1, 2):
            folder(row_with_a_box(small, picture_file))
            lines = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
            assert len(lines) == count and "a café" in lines[-1]


def test_names_that_are_not_unicode_are_kept(small: florence2.Florence2, picture_file: Path, tmp_path: Path) -> None:
    row = row_with_a_box(small, picture_file)
    with Folder(tmp_path / "out", draw=False, settings={}) as folder:
        folder(replace(row, source=replace(row.source, name="caf\udce9.png")))
    (values,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert values["image"] == "caf\udce9.png"


def write_other(path: Path) -> None:
    make_picture(3, 320, 200).save(path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (Path.unlink, "does not exist"),
        (write_other, "has changed since it was read"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "cannot be read"),
        (lambda path: path.write_text("text"), "is not an image"),
    ],
)
def test_an_image_that_cannot_be_drawn_keeps_its_answer(
    spoil: Callable[[Path], object], reason: str, small: florence2.Florence2, picture_file: Path, tmp_path: Path
) -> None:
    row = row_with_a_box(small, picture_file)
    row = replace(row, version=row.source.version())
    spoil(picture_file)
    with Folder(tmp_path / "out", draw=True, settings={}) as folder:
        written = folder(row)
        other = folder(row_with_a_box(small, save_image(tmp_path / "other.png")))
    assert reason in written.drawing_error and written.drawing is None and other.drawing is not None
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert rows[0]["boxes"] and reason in rows[0]["drawing_error"] and "drawing" not in rows[0]
    assert "drawing_error" not in rows[1] and len(list((tmp_path / "out").rglob("*.png"))) == 1


def undrawn(small: florence2.Florence2, folder: Path, *names: str) -> list[Row]:
    """Make images, and a folder with an answer about each that is not drawn."""
    rows = [row_with_a_box(small, save_image(folder / name)) for name in names]
    rows = [replace(row, source=replace(row.source, stem=Path(row.source.name).stem)) for row in rows]
    with Folder(folder / "out", draw=False, settings={}) as journal:
        for row in rows:
            journal(replace(row, version=row.source.version()))
    return rows


def stored(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


def test_earlier_answers_are_drawn_in_their_rows(small: florence2.Florence2, tmp_path: Path) -> None:
    rows = undrawn(small, tmp_path, "a.png", "b.png", "c.png")
    before, calls = stored(tmp_path), []
    with Folder(tmp_path / "out", draw=True, settings={}, rows=rows[:2]) as folder:
        assert folder.draw_earlier(lambda *call: calls.append(call)) == [] and calls == [(1, 2), (2, 2)]
        folder(row_with_a_box(small, tmp_path / "c.png", "<CAPTION_TO_PHRASE_GROUNDING>"))
    drawings = [{"drawing": "a.od.png"}, {"drawing": "b.od.png"}, {}]
    assert stored(tmp_path)[:3] == [{**row, **drawing} for row, drawing in zip(before, drawings, strict=True)]
    assert len(stored(tmp_path)) == 4
    fresh = rows[0].answer.draw(tmp_path / "a.png")
    assert open_image(tmp_path / "out" / "a.od.png").tobytes() == fresh.tobytes()


def test_a_drawing_that_failed_is_tried_again(small: florence2.Florence2, tmp_path: Path) -> None:
    (row,) = undrawn(small, tmp_path, "a.png")
    results = tmp_path / "out" / "results.jsonl"
    sound = stored(tmp_path)[0]
    for spoilt in ({**sound, "boxes": [7]}, {**sound, "image_size": [400, 300]}):
        results.write_text(json.dumps(spoilt) + "\n")
        with Folder(tmp_path / "out", draw=True, settings={}, rows=[row]) as folder:
            (failed,) = folder.draw_earlier()
        assert stored(tmp_path) == [{**spoilt, "drawing_error": failed.drawing_error}] and failed.drawing_error
    results.write_text(json.dumps({**sound, "drawing_error": "The disk was full."}) + "\n")
    with Folder(tmp_path / "out", draw=True, settings={}, rows=[row]) as folder:
        assert folder.draw_earlier() == []
    assert stored(tmp_path) == [{**sound, "drawing": "a.od.png"}]


def test_a_stopped_drawing_keeps_every_row(small: florence2.Florence2, tmp_path: Path) -> None:
    rows = undrawn(small, tmp_path, "a.png", "b.png", "c.png")

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Folder(tmp_path / "out", draw=True, settings={}, rows=rows) as folder:
        folder.draw_earlier(stop)
    assert [row.get("drawing") for row in stored(tmp_path)] == ["a.od.png", None, None]
    with Folder(tmp_path / "out", draw=True, settings={}, rows=rows) as folder:
        assert folder.draw_earlier() == []
    assert all("drawing" in row for row in stored(tmp_path))


def save_image(path: Path) -> Path:
    make_picture(5, 320, 200).save(path)
    return path


@pytest.mark.parametrize("letter", ["x", "é", "日", "\N{GRINNING FACE}"])
def test_long_names_are_shortened_and_stay_apart(
    letter: str, small: florence2.Florence2, picture_file: Path, tmp_path: Path
) -> None:
    stem = letter * (250 // len(letter.encode()))
    with Folder(tmp_path / "out", draw=True, settings={}) as folder:
        for name in (stem, stem[:-1] + "1", f"sub/{stem}", stem):
            row = row_with_a_box(small, picture_file)
            drawn = folder(replace(row, source=replace(row.source, stem=name)))
            assert drawn.drawing_error is None and (tmp_path / "out" / drawn.drawing).is_file()
    files = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")]
    assert len(files) == 4 and sum(file.endswith(".od-2.png") for file in files) == 1
    assert all(Path(file).name.startswith(letter * 40) for file in files)


def test_a_full_disk_costs_a_drawing_but_no_row(small: florence2.Florence2, picture_file: Path, tmp_path: Path) -> None:
    with Folder(tmp_path / "out", draw=True, settings={}) as folder, files_of_at_most(1500):
        row = folder(row_with_a_box(small, picture_file))
    assert row.drawing_error == "The drawing cannot be written: File too large."
    assert not [path for path in (tmp_path / "out").rglob("*") if "photo" in path.name]
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 1


def test_a_row_is_written_wholly_or_not_at_all(small: florence2.Florence2, picture_file: Path, tmp_path: Path) -> None:
    results = tmp_path / "out" / "results.jsonl"
    with Folder(tmp_path / "out", draw=False, settings={}) as folder:
        folder(row_with_a_box(small, picture_file))
        first = results.read_bytes()
        with (
            files_of_at_most(len(first) + 20),
            pytest.raises(OptionError, match=r"results.jsonl cannot be written: File too large\. The rows in it are"),
        ):
            folder(row_with_a_box(small, picture_file))
        assert results.read_bytes() == first


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "out", tmp_path / ("x" * 300), Path("/proc/out")):
        with pytest.raises(OptionError, match=r"out cannot be written|x cannot be written"):
            Folder(path, draw=False, settings={})
