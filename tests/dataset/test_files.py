"""Many files: what is made, and what cannot be."""

import errno
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from florence2.dataset import files
from florence2.dataset.files import Files
from florence2.dataset.writing import write_views
from florence2.errors import OutputError
from tests.dataset.rows import boxes, write_rows


def test_files_and_links_in_folders_of_their_own(tmp_path: Path) -> None:
    made = Files()
    for number in range(3):
        made.make(f"{tmp_path}/a/{number % 2}/{number}.txt", b"text" * number)
    made.make(f"{tmp_path}/b/link", f"{tmp_path}/a/0/2.txt")
    assert (tmp_path / "b/link").readlink() == tmp_path / "a/0/2.txt" and (
        tmp_path / "b/link"
    ).read_bytes() == b"texttext"
    assert [path.name for path in sorted(tmp_path.rglob("*.txt"))] == ["0.txt", "2.txt", "1.txt"]
    with pytest.raises(OSError, match="exists") as caught:
        made.make(f"{tmp_path}/b/link", "elsewhere")
    assert caught.value.errno == errno.EEXIST


class NearlyFull(FileIO):
    """A file of which a disk takes three bytes at a time, and at last none."""

    def write(self, data: Any) -> int:
        if self.tell() + 3 > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data[:3])


def test_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FileIO", NearlyFull)
    Files().make(f"{tmp_path}/fits", b"12345")
    assert (tmp_path / "fits").read_bytes() == b"12345"
    source = write_rows(tmp_path / "rows", [boxes("0.jpg", ("x", 0, 0, 5, 5))])
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        write_views(source, ["yolo"], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*yolo*"))
