"""An output folder appears whole, or not at all."""

from pathlib import Path

import pytest

from florence2.errors import OutputError
from florence2.export.folder import new_folder


@pytest.mark.parametrize("existed", [False, True])
def test_it_appears_when_all_is_written(tmp_path: Path, existed: bool) -> None:
    folder = tmp_path / "a" / "b"
    if existed:
        folder.mkdir(parents=True)
    with new_folder(folder) as draft:
        (draft / "file").write_text("text")
        assert not (folder / "file").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (folder / "file").read_text() == "text"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("wrong")])
def test_nothing_stays_of_a_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_folder(tmp_path / "a" / "b") as draft:
        (draft / "inside").mkdir()
        (draft / "inside" / "file").write_text("text")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(OutputError, match="cannot be written: Directory not empty"), new_folder(folder):
        folder.mkdir()
        (folder / "theirs").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match=r"file/out cannot be written: Not a directory\."),
        new_folder(tmp_path / "file" / "out"),
    ):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="link is not a folder"), new_folder(tmp_path / "link"):
        pass
