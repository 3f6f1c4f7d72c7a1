"""Many files: those that a second process makes are the same, and what it cannot make is said."""

import errno
import time
from pathlib import Path

import pytest

from florence2.dataset import files
from florence2.dataset.files import Files
from florence2.dataset.writing import write_views
from florence2.errors import OutputError
from tests.dataset.rows import boxes, caption, files_below, write_rows

AT_ONCE = 1000


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first two files are made without a second process."""
    monkeypatch.setattr(files, "FEW", 2)


def test_a_second_process_makes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [tmp_path / f"{number:04}.jpg" for number in range(2 * AT_ONCE + 5)]
    images[7].write_bytes(b"an image")
    rows = [boxes(f"{image.stem[:2]}/{image.name}", ("x", 0, 0, 5, 5)) | {"place": str(images[7])} for image in images]
    rows += [caption(row["id"], f"text {row['id']}") | {"place": row["place"]} for row in rows]
    source = write_rows(tmp_path / "rows", rows)
    views = ["yolo", "captions", "metadata"]
    write_views(source, views, tmp_path / "out")
    alone = files_below(tmp_path / "out")
    monkeypatch.setattr(files, "FEW", 2)
    report = write_views(source, views, tmp_path / "out")
    assert files_below(tmp_path / "out") == alone and report.complete
    assert len(alone) == 4 * len(images) + 5  # twice a file and a link, and five of their own
    assert (tmp_path / "out/yolo/images/train/20/2004.jpg").readlink() == images[7]


@pytest.mark.usefixtures("few")
def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    made = Files()
    for number in range(3):
        made.make(f"{tmp_path}/{number}", b"")
    made.make(f"{tmp_path}/1/below-a-file", b"")
    with pytest.raises(OSError, match="File exists") as caught:
        made.finish()
    made.close()
    assert caught.value.errno == errno.EEXIST and (tmp_path / "2").exists()


@pytest.mark.usefixtures("few")
def test_an_error_ends_the_work_before_all_is_sent(tmp_path: Path) -> None:
    made = Files()
    made.make(f"{tmp_path}/file", b"")
    with pytest.raises(OSError, match="File exists"):
        for number in range(1000 * AT_ONCE):
            made.make(f"{tmp_path}/file/{number}" if number else f"{tmp_path}/other", b"")
    made.close()


@pytest.mark.usefixtures("few")
def test_a_process_that_is_killed_is_an_error(tmp_path: Path) -> None:
    made = Files()
    for number in range(5):
        made.make(f"{tmp_path}/{number}", b"")
    assert made._process is not None
    made._process.kill()
    with pytest.raises(OSError, match="the process that makes the files was ended"):
        made.finish()
    made.close()


@pytest.mark.usefixtures("few")
def test_nothing_is_made_after_the_end(tmp_path: Path) -> None:
    """A view that is given up is removed; nothing may appear in its place."""
    made = Files()
    for number in range(2 * AT_ONCE):
        made.make(f"{tmp_path}/view/{number}", b"")
    made.close()
    there = len(list(tmp_path.rglob("*")))
    time.sleep(0.2)
    assert len(list(tmp_path.rglob("*"))) == there < 2 * AT_ONCE


@pytest.mark.usefixtures("few")
def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    """The last files are written where a folder of the same name stands."""
    source = write_rows(tmp_path / "rows", [boxes(f"{number}.jpg") for number in range(5)])
    made = Files.make

    def in_the_way(self: Files, path: str, content: bytes | str) -> None:
        made(self, f"{path}/below/0.txt" if path.endswith("4.txt") else path, content)
        made(self, f"{path}/below" if path.endswith("4.txt") else path, content)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputError, match="cannot be written"):
        patch.setattr(Files, "make", in_the_way)
        write_views(source, ["yolo"], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*yolo*"))
