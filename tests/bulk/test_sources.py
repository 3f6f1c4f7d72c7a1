"""From command line arguments to images."""

import base64
import io
from pathlib import Path

import pytest

from florence2.bulk.sources import find_images
from florence2.errors import ImageError


def test_folders_files_and_names(album: Path) -> None:
    sources = find_images([str(album), "absent.png"])
    assert [Path(source.name).name for source in sources] == ["a.png", "b.jpg", "c.png", "d.png", "a.png", "absent.png"]
    assert [source.stem for source in sources] == ["a", "b", "c", "d", "deeper/a", "absent"]


def test_equal_stems_are_numbered(album: Path) -> None:
    stems = [source.stem for source in find_images([str(album / "a.png"), str(album / "deeper" / "a.png")])]
    assert stems == ["a", "a-2"]
    names = [str(album / "a.png"), str(album / "deeper" / "a.png"), "x/a-2.png", "a.gif"]
    assert [source.stem for source in find_images(names)] == ["a", "a-2", "a-2-2", "a-3"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no image: no file ends in .jpg"):
        find_images([str(tmp_path)])


def test_data_urls_are_images(picture_file: Path) -> None:
    data = picture_file.read_bytes()
    (source,) = find_images([f"data:image/png;base64,{base64.b64encode(data).decode()}"])
    assert source.data == data and source.stem == "data" and len(source.name) < 50
    with pytest.raises(ImageError, match="does not hold base64"):
        find_images(["data:image/png;base64,#"])


@pytest.mark.parametrize("url", ["https://example.com//a/x.png?u=http://b.c/d", "s3://bucket/x.png", "HTTP://a/b.jpg"])
def test_urls_are_refused_as_they_were_written(url: str) -> None:
    with pytest.raises(ImageError) as raised:
        find_images(["photo.png", url])
    assert str(raised.value).startswith(f"{url} is a URL, which is not fetched here; download it first")


def test_an_empty_name_is_not_the_current_folder(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(album)
    with pytest.raises(ImageError, match="empty"):
        find_images([""])


def test_stdin(monkeypatch: pytest.MonkeyPatch, picture_file: Path) -> None:
    class Stdin:
        buffer = io.BytesIO(picture_file.read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin)
    (source,) = find_images(["-"])
    assert source.data == picture_file.read_bytes() and source.stem == "stdin"
    monkeypatch.setattr("florence2.bulk.sources.MAX_STDIN_BYTES", 10)
    Stdin.buffer.seek(0)
    with pytest.raises(ImageError, match="stdin has more than"):
        find_images(["-"])
