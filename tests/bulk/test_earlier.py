"""An earlier run's files: nothing in them is lost, and no damage ends in a traceback."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from florence2.answers.answer import parse_answer
from florence2.bulk.earlier import DAMAGED_NAME, read_earlier
from florence2.bulk.journal import Folder
from florence2.bulk.rows import Row, TaskQuestion, row_key
from florence2.bulk.sources import Source
from florence2.errors import OptionError

REQUESTED = Row(Source("/b", Path("/b"), "b"), TaskQuestion("<OD>"))
DAMAGES = {
    "deep": b"[" * 100_000,
    "deep row": b'{"place": "/a", "task": "<OD>", "x": ' + b"[" * 100_000,
    "digits": b'{"place": "/a", "task": "<OD>", "x": ' + b"7" * 5_000 + b"}",
    "no UTF-8": b'{"place": "/a\xff", "task": "<OD>"}',
    "NUL": b"\0" * 300,
    "half": b'{"place": "/a", "ta',
    "list": b'["/a", "<OD>"]',
    "number": b"7",
    "nothing": b"",
    "no row": b'{"place": 3}',
}


def row(place: str, **more: Any) -> dict[str, Any]:
    answer = {} if "error" in more else {"text": "a cup"}
    return {"image": place, "place": place, "task": "<OD>", **answer, **more}


def line(place: str, **more: Any) -> bytes:
    return json.dumps(row(place, **more)).encode() + b"\n"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_line_is_set_aside(damage: bytes, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_bytes(line("/a") + damage + b"\n" + line("/b"))
    with Folder(tmp_path, draw=False, settings={}) as folder:
        assert folder.done == {row_key(row("/a")), row_key(row("/b"))}
        (note,) = folder.notes
    assert "has 1 damaged lines, the first of them line 2" in note and DAMAGED_NAME in note
    assert results.read_bytes() == line("/a") + line("/b")
    assert (tmp_path / DAMAGED_NAME).read_bytes() == damage + b"\n"
    with Folder(tmp_path, draw=False, settings={}) as folder:
        assert folder.notes == []


def test_a_row_that_was_not_written_to_its_end_is_written_again(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_bytes(line("/a") + line("/b")[:-5])
    with Folder(tmp_path, draw=False, settings={}) as folder:
        assert folder.done == {row_key(row("/a"))} and folder.notes == []
    assert results.read_bytes() == line("/a") and not (tmp_path / DAMAGED_NAME).exists()


def test_a_last_row_without_its_line_end_stays(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(line("/a")[:-1])
    with Folder(tmp_path, draw=False, settings={}) as folder:
        assert len(folder.done) == 1
    assert (tmp_path / "results.jsonl").read_bytes() == line("/a")


def test_failures_of_other_images_stay(tmp_path: Path) -> None:
    """Only those that this run asks again are removed."""
    results = tmp_path / "results.jsonl"
    results.write_bytes(line("/a", error="bad") + line("/b", error="bad"))
    with Folder(tmp_path, draw=False, settings={}, rows=[REQUESTED]):
        pass
    assert results.read_bytes() == line("/a", error="bad")


def test_a_file_without_anything_to_drop_is_not_written(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_bytes(line("/a"))
    before = results.stat()
    with Folder(tmp_path, draw=False, settings={}):
        pass
    assert (results.stat().st_ino, results.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


NESTED = {f"nested {n}": b'{"model": ' + b"[" * n + b"]" * n + b"}" for n in (200, 900, 990)}


@pytest.mark.parametrize("damage", [*DAMAGES.values(), *NESTED.values()], ids=[*DAMAGES, *NESTED])
def test_damaged_settings_are_a_sentence_with_the_remedy(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(line("/a"))
    (tmp_path / "settings.json").write_bytes(damage)
    with pytest.raises(OptionError, match=r"holds answers made with other settings|Delete the file if") as error:
        Folder(tmp_path, draw=False, settings={"model": "base"})
    assert len(str(error.value)) < 1000
    (tmp_path / "settings.json").unlink()
    with Folder(tmp_path, draw=False, settings={"model": "base"}) as folder:
        assert len(folder.done) == 1
    assert json.loads((tmp_path / "settings.json").read_text()) == {"model": "base"}


def test_a_row_without_an_answer_is_damage(tmp_path: Path) -> None:
    """Taken for an answer, its question would never be asked again."""
    (tmp_path / "results.jsonl").write_bytes(b'{"place": "/a", "task": "<OD>"}\n' + line("/b"))
    with Folder(tmp_path, draw=False, settings={}) as folder:
        assert len(folder.done) == 1 and "1 damaged" in folder.notes[0]


def test_requested_answers_are_counted_once(tmp_path: Path) -> None:
    """Those that were cut off or lack a part too, wherever in a cascade the cut is."""
    cut = {"finish_reason": "length"}
    more: list[dict[str, Any]] = [
        {},
        cut,
        {"segments": [{}, cut]},
        {"grounding": cut},
        {"missing": ["It is too long."]},
    ]
    places = [f"/{i}" for i in range(len(more))]
    lines = [line(place, **values) for place, values in zip(places, more, strict=True)]
    (tmp_path / "results.jsonl").write_bytes(b"".join([*lines, lines[1], line("/other", **cut), line("/e", error="x")]))
    rows = [Row(Source(place, Path(place), "x"), TaskQuestion("<OD>")) for place in (*places, "/e", "/new")]
    earlier = read_earlier(tmp_path / "results.jsonl", {row.key: row for row in rows})
    assert (earlier.requested, earlier.cut_off, earlier.incomplete) == (5, 3, 1)
    assert len(earlier.done) == 6 and earlier.dropped == [7]


def test_an_outdated_answer_stays_until_an_answer_replaces_it(tmp_path: Path) -> None:
    """And nothing else does, although the lines before it are tidied up: not an error, not a drawing of it."""
    image = tmp_path / "a.png"
    Image.new("RGB", (10, 10)).save(image)
    place, out = str(image), tmp_path / "out"
    out.mkdir()
    results = out / "results.jsonl"
    outdated = line(place, kind="boxes", file={"bytes": 1, "modified_ns": 1})
    results.write_bytes(b"damage\n" + outdated + line("/c"))
    asked = Row(Source(place, image, place), TaskQuestion("<OD>"))
    with Folder(out, True, {}, rows=[asked]) as folder:
        assert folder.done == {row_key(row("/c"))} and folder.draw_earlier() == []
        folder(replace(asked, error="no memory"))
    assert results.read_bytes().startswith(outdated)
    with Folder(out, True, {}, rows=[asked]) as folder:
        folder(replace(asked, answer=parse_answer("<OD>", "boxes", "", (10, 10)), version=asked.source.version()))
    places = [json.loads(each)["place"] for each in results.read_text().splitlines()]
    assert places == ["/c", place] and read_earlier(results, {asked.key: asked}).outdated == {}
