"""The journal of a labelling run: nothing is lost, however a run ends, and nothing is rewritten before it ends well."""

import json
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from florence2.bulk.earlier import DAMAGED_NAME, parse_row
from florence2.bulk.row_file import to_line
from florence2.bulk.rows import Row
from florence2.errors import OptionError, OutputError
from florence2.label.journal import Journal
from florence2.label.keys import By, question_part, row_key, source_key, version_state
from tests.full_disk import files_of_at_most
from tests.label.conftest import row

NAMES = ("a", "b", "c", "d")


def key(each: Row, by: str = "place") -> int:
    return source_key(each.source, question_part(each.question.to_dict()), by)


def order(*rows: Row) -> "array[int]":
    return array("Q", [key(each) for each in rows])


def write(folder: Path, *rows: Row, **options) -> None:
    with Journal(folder, {}, **options) as journal:
        for each in rows:
            journal(each)


def stored(folder: Path) -> list[str]:
    """The names of the images of the rows, with a "!" after an error."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [each["id"] + "!" * ("error" in each) for each in rows]


def finished(folder: Path, *names: str) -> str:
    """Those of the names that a new run does not answer again."""
    with Journal(folder, {}) as journal:
        return "".join(name for name in names if journal.finished.holds(key(row(name)), None))


def test_finished_rows_are_known_again(tmp_path: Path) -> None:
    write(tmp_path, row("a"), row("b", None), row("c"))
    before = (tmp_path / "results.jsonl").read_bytes()
    with Journal(tmp_path, {}) as journal:
        assert len(journal.finished) == 2 and not journal.notes
    assert finished(tmp_path, *NAMES) == "ac" and (tmp_path / "results.jsonl").read_bytes() == before


def test_the_last_row_of_a_question_counts(tmp_path: Path) -> None:
    write(tmp_path, row("a"), row("b", None), row("a", None), row("b"))
    assert finished(tmp_path, "a", "b") == "b"


def test_another_version_of_a_file_is_not_finished(tmp_path: Path) -> None:
    write(tmp_path, row("a", version=(1, 10, 100)), row("b"))
    with Journal(tmp_path, {}) as journal:
        holds = journal.finished.holds
        states = [version_state((2, 10, 100)), version_state((1, 10, 101)), version_state((1, 11, 100)), None]
        assert [holds(key(row("a")), state) for state in states] == [True, False, False, True]


def test_a_finished_question_takes_eight_bytes(tmp_path: Path) -> None:
    write(tmp_path, *(row(str(number), version=(1, 10, number)) for number in range(100)), row("b", None))
    for by in get_args(By):
        (tmp_path / ".results.index").unlink()
        with Journal(tmp_path, {}, by=by) as journal:
            arrays = {id(value): value for value in vars(journal.finished).values() if isinstance(value, np.ndarray)}
            assert len(journal.finished) == 100 and sum(array.nbytes for array in arrays.values()) == 800
            assert all(array.base is None for array in arrays.values())  # nor do they keep the index in memory


def test_by_ids_an_image_may_have_moved(tmp_path: Path) -> None:
    write(tmp_path, row("a"))
    moved = Row(row("a").source.__class__("a", Path("/elsewhere/a"), "a", "a"), row("a").question)
    with Journal(tmp_path, {}) as journal:
        assert not journal.finished.holds(key(moved), None)
    with Journal(tmp_path, {}, by="id") as journal:
        assert journal.finished.holds(key(moved, "id"), None) and not journal.finished.holds(key(row("b"), "id"), None)


def cut_index(index: Path) -> None:
    os.truncate(index, index.stat().st_size - 30)


def change_index(index: Path) -> None:
    content = bytearray(index.read_bytes())
    content[-20] ^= 1
    index.write_bytes(content)


def index_of_other_rows(index: Path) -> None:
    results = index.with_name("results.jsonl")
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(sorted(lines, reverse=True)))


@pytest.mark.parametrize(
    "spoil", [Path.unlink, cut_index, change_index, index_of_other_rows, lambda index: index.write_bytes(b"x" * 99)]
)
def test_an_index_that_does_not_fit_is_made_again(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path, row("a"), row("b", None), row("c"))
    sound = (tmp_path / ".results.index").read_bytes()
    spoil(tmp_path / ".results.index")
    assert finished(tmp_path, *NAMES) == "ac"
    made = (tmp_path / ".results.index").read_bytes()
    assert made == sound or spoil is index_of_other_rows


def test_a_sound_index_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few lines are compared with it, the last among them."""
    names = [f"{number:02}" for number in range(60)]
    write(tmp_path, *map(row, names))
    parsed: list[bytes] = []

    def parse(line: bytes) -> object:
        parsed.append(line)
        return parse_row(line)

    monkeypatch.setattr("florence2.label.index.parse_row", parse)
    assert finished(tmp_path, *names) == "".join(names)
    assert parsed == sorted(set(parsed)) and 10 < len(parsed) < 20
    assert json.loads(parsed[0])["id"] == "00" and json.loads(parsed[-1])["id"] == "59"


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_only_a_torn_last_line_is_cut(cut: int, tmp_path: Path) -> None:
    """A whole row that lacks no more than its end is kept."""
    write(tmp_path, row("a"), row("b"))
    results = tmp_path / "results.jsonl"
    whole = results.read_bytes()
    os.truncate(results, len(whole) - cut)
    assert finished(tmp_path, "a", "b") == ("ab" if cut == 1 else "a")
    assert results.read_bytes() == (whole if cut == 1 else whole[: whole.index(b"\n") + 1])
    write(tmp_path, *[row("b")][cut == 1 :])
    assert results.read_bytes() == whole


def test_a_damaged_line_is_kept_apart(tmp_path: Path) -> None:
    write(tmp_path, row("a"), row("b"))
    results = tmp_path / "results.jsonl"
    first, second = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(first[:50] + b"\n" + second)
    with Journal(tmp_path, {}) as journal:
        assert journal.notes[0].startswith(f"{results} has 1 damaged line, which will be moved to {DAMAGED_NAME}")
        journal(row("a"))
        journal.compact(order(row("a"), row("b")))
    assert stored(tmp_path) == ["a", "b"] and (tmp_path / DAMAGED_NAME).read_bytes() == first[:50] + b"\n"
    with Journal(tmp_path, {}) as journal:
        assert not journal.notes


def test_compaction(tmp_path: Path) -> None:
    """The order of the input, the last row of each question, and the rows of other inputs at the end."""
    names = ("x", "d", "b", "c", "b", "a", "y", "d")
    write(tmp_path, *(row(name, f"{name} {number}") for number, name in enumerate(names)))
    with Journal(tmp_path, {}) as journal:
        assert journal.compact(order(*(row(name) for name in ("a", "b", "e", "c", "d", "b")))) == (2, 0)
        journal(row("e", None))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [each.get("text") for each in rows] == ["a 5", "b 4", "c 3", "d 7", "x 0", "y 6", None]
    assert finished(tmp_path, *names) == "xdbcbayd"
    before = (tmp_path / ".results.index").read_bytes()
    (tmp_path / ".results.index").unlink()
    assert finished(tmp_path, "a", "e") == "a" and (tmp_path / ".results.index").read_bytes() == before


def stored_ids(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "results.jsonl").read_bytes().splitlines()]


def test_errors_about_other_images_stay_or_are_taken_out(tmp_path: Path) -> None:
    write(tmp_path, row("gone", None), row("b", None), row("other"), row("a"))
    named = order(row("a"), row("b"))
    with Journal(tmp_path, {}) as journal:
        assert journal.compact(named) == (2, 1)
    assert stored_ids(tmp_path) == ["a", "b", "gone", "other"]
    with Journal(tmp_path, {}) as journal:
        assert journal.compact(named, keep_failed=False) == (2, 1)
        assert journal.compact(named, keep_failed=False) == (1, 0)
    assert stored_ids(tmp_path) == ["a", "b", "other"]


def test_rows_in_order_are_not_written_again(tmp_path: Path) -> None:
    write(tmp_path, row("a"), row("b"))
    inode = (tmp_path / "results.jsonl").stat().st_ino
    with Journal(tmp_path, {}) as journal:
        journal.compact(order(row("a"), row("b")))
    assert (tmp_path / "results.jsonl").stat().st_ino == inode


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path, row("b"), row("a"))
    results = tmp_path / "results.jsonl"
    before = results.read_bytes()
    with Journal(tmp_path, {}) as journal, files_of_at_most(len(before) - 10):
        with pytest.raises(OptionError, match=r"results.jsonl cannot be written: File too large\. The rows in it are"):
            journal(row("c"))
        with pytest.raises(OutputError, match=r"File too large\. Make room"):
            journal.compact(order(row("a"), row("b")))
    assert results.read_bytes() == before and finished(tmp_path, *NAMES) == "ab"
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".results.index", "results.jsonl", "settings.json"}


@pytest.mark.parametrize("missed", ["full disk", "stopped before the record"])
def test_a_row_without_a_record_is_not_lost(missed: str, tmp_path: Path) -> None:
    """Neither in the next run nor when the rows are put in order."""
    with Journal(tmp_path, {}) as journal:
        if missed == "full disk":
            os.dup2(os.open("/dev/full", os.O_WRONLY), journal._index._file.fileno())
            journal(row("c"))
        else:
            journal._file.append(to_line(row("c").to_dict()))
        journal(row("b"))
        journal(row("a"))
        assert len(journal._index.records()) == 0
        journal.compact(order(row("a"), row("b"), row("c")))
        assert stored(tmp_path) == ["a", "b", "c"]
    assert finished(tmp_path, *NAMES) == "abc"


KILLED = """
import os, sys
from array import array
from pathlib import Path
from florence2.label.journal import Journal
setattr(Path, sys.argv[2], lambda *_: os._exit(9))
with Journal(Path(sys.argv[1]), {}) as journal:
    journal.compact(array("Q", map(int, sys.argv[3:])))
"""


@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_a_kill_in_compaction_loses_nothing(step: str, tmp_path: Path) -> None:
    """`replace` puts the new rows in place; the index is removed before."""
    write(tmp_path, row("b"), row("a"))
    keys = map(str, order(row("a"), row("b")))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), step, *keys])
    assert killed.returncode == 9 and any(path.name.startswith(".results.jsonl.") for path in tmp_path.iterdir())
    assert finished(tmp_path, *NAMES) == "ab" and stored(tmp_path) == ["b", "a"]
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".results.index", "results.jsonl", "settings.json"}


def test_settings_are_not_mixed(tmp_path: Path) -> None:
    with Journal(tmp_path, {"model": "base"}) as journal:
        journal(row("a", None))
    with Journal(tmp_path, {"model": "large"}) as journal:  # no answer depends on the other one
        journal(row("a"))
    with pytest.raises(OptionError, match="holds answers made with other settings"):
        Journal(tmp_path, {"model": "base"})


def test_shards_run_at_once_and_are_not_mixed(tmp_path: Path) -> None:
    with Journal(tmp_path, {}, shard=(1, 2)) as first, Journal(tmp_path, {}, shard=(2, 2)) as second:
        first(row("a"))
        second(row("b"))
        with pytest.raises(OptionError, match="Another run is writing"):
            Journal(tmp_path, {}, shard=(2, 2))
    with pytest.raises(OptionError, match="holds answers made with other settings"):
        Journal(tmp_path, {"model": "large"}, shard=(2, 2))
    assert sorted(path.name for path in tmp_path.glob("results*")) == ["results.1-of-2.jsonl", "results.2-of-2.jsonl"]
    for shard in (None, (1, 3)):
        with pytest.raises(OptionError, match=r"divided into 2 shards \(results.1-of-2.jsonl\)"):
            Journal(tmp_path, {}, shard=shard)


def test_a_results_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(OptionError, match="not a regular file"):
        Journal(tmp_path, {})
    with Journal(tmp_path / "other", {}) as journal:  # the lock was given back
        journal(row("a"))


def test_rows_are_on_the_disk_at_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, synced = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(now[0]))
    with Journal(tmp_path, {}) as journal:
        for seconds in (10, 25, 10, 25):
            now[0] += seconds
            journal(row("a"))
        assert synced == [135, 170]
    assert synced == [135, 170, 170]


@pytest.mark.parametrize(
    ("place", "one", "other", "same"),
    [
        ("/photos/a/x.jpg", "x.jpg", "a/x.jpg", True),
        ("C:\\photos\\x.jpg", "x.jpg", "photos\\x.jpg", True),
        ("/photos/a/x.jpg", "x.jpg", "x.jpg-2", False),
        ("/photos/a/x.jpg", "7", "8", False),
        ("/photos/ax.jpg", "x.jpg", "ax.jpg", False),
        ("/shards/1.TAR::a.jpg", "a", "1/a", True),
        ("/tables/1.parquet::5", "seven", "1/seven", True),
        ("/odd::names/x.jpg", "7", "8", False),
    ],
)
def test_an_id_that_the_place_says_already_is_not_a_part_of_a_key(place: str, one: str, other: str, same: bool) -> None:
    rows = [{"place": place, "id": id, "task": "<OD>"} for id in (one, other)]
    keys = [row_key(row, "place") for row in rows]
    assert (keys[0] == keys[1]) == same
    assert row_key(rows[0], "id") != row_key(rows[1], "id")
