"""File objects, data URLs, and names that are not paths."""

import base64
import io
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from florence2.errors import ImageError
from florence2.inputs import files
from florence2.inputs.image import open_image
from parity.recipe import make_picture
from tests.inputs.test_image import saved


class Trickle:
    """A file object that returns one byte at a time, as sockets may."""

    def __init__(self, data: bytes):
        self.rest = data

    def read(self, size: int) -> bytes:
        first, self.rest = self.rest[:1], self.rest[1:]
        return first


def test_file_objects_are_read_from_their_position_to_their_end() -> None:
    data = saved(make_picture(1, 8, 8))
    assert open_image(Trickle(data)).size == (8, 8)
    file = io.BytesIO(b"header" + data)
    file.seek(6)
    assert open_image(file).size == (8, 8)
    with pytest.raises(ImageError, match="at its end; seek"):
        open_image(file)


def test_unusable_file_objects_get_a_sentence() -> None:
    closed = io.BytesIO(b"x")
    closed.close()
    for file, words in (
        (io.StringIO("text"), "binary mode"),
        (io.BytesIO(b"text"), "The file object's data is not an image"),
        (closed, "cannot be read: I/O operation on closed file"),
    ):
        with pytest.raises(ImageError, match=words):
            open_image(file)  # type: ignore[arg-type]


def test_endless_file_objects_are_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_STREAM_BYTES", 5 << 20)
    with Path("/dev/zero").open("rb") as file:
        with pytest.raises(ImageError, match="more than 5 MiB"):
            open_image(file)
        assert file.tell() <= 7 << 20


def data_url(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


def test_data_urls() -> None:
    image = make_picture(1, 9, 8)
    url = data_url(saved(image))
    head, _, content = url.partition(",")
    lines = "\n".join(content[start : start + 76] for start in range(0, len(content), 76))
    for text in (
        url,
        data_url(saved(image), "DATA:;charset=utf-8;BASE64,"),
        f"{head},{lines}",
        f"{head},{quote(content)}",
        url.rstrip("="),
    ):
        assert np.array_equal(np.asarray(open_image(text)), np.asarray(image)), text[:40]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:", "must begin as data:image/png;base64,"),
        ("data:image/png;base64", "must begin as"),
        ("data:image/svg+xml,<svg/>", "must begin as"),
        ("data:image/png;base64,", "content is empty"),
        ("data:image/png;base64,####" + "A" * 200_000, "does not hold base64"),
        ("data:image/png;base64,A" + "é" * 1000, "does not hold base64"),
        ("data:image/png;base64," + "A" * 200_001, "does not hold base64"),
        ("data:image/png;base64," + "A" * 200_000, "content is not an image"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "is in the format EPS"),
        (data_url(saved(make_picture(1, 99, 88)))[:2000], "content cannot be read"),
    ],
)
def test_wrong_data_urls_get_a_short_sentence(url: str, words: str) -> None:
    with pytest.raises(ImageError, match=words) as raised:
        open_image(url)
    assert len(str(raised.value)) < 300


def test_long_data_urls_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_STREAM_BYTES", 1 << 20)
    with pytest.raises(ImageError, match="The data URL has more than 1 MiB"):
        open_image("data:image/png;base64," + "A" * (2 << 20))
    monkeypatch.setattr(files, "MAX_STREAM_BYTES", 6)
    assert files.read_data_url("data:image/png;base64," + "A" * 8).read() == bytes(6)
    with pytest.raises(ImageError, match="The data URL has more than"):
        files.read_data_url("data:image/png;base64," + "A" * 9)
    assert files.read_stream(io.BytesIO(bytes(6))).read() == bytes(6)
    with pytest.raises(ImageError, match="The file object has more than"):
        files.read_stream(io.BytesIO(bytes(7)))


@pytest.mark.parametrize("scheme", ["https", "http", "HTTPS", "ftp", "s3", "gs"])
def test_other_urls_are_not_fetched(scheme: str) -> None:
    url = f"{scheme}://example.com/a/x.png?size=5"
    for source in (url, Path(url)):
        with pytest.raises(ImageError) as raised:
            open_image(source)
        assert str(raised.value).startswith(f"{url} is a URL, which is not fetched here; download it first")


def test_a_file_url_gets_its_own_remedy() -> None:
    with pytest.raises(ImageError, match=r"^file:///tmp/x.png is a URL; give the path of the file without file://"):
        open_image("file:///tmp/x.png")


def test_names_that_cannot_be_paths(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="The image's name is empty"):
        open_image("")
    for name in ("x" * 100_000, "a\0b", "https://" + "x" * 100_000, "\ud800"):
        with pytest.raises(ImageError) as raised:
            open_image(name)
        assert len(str(raised.value)) < 800
    colon = tmp_path / "a:b.png"
    make_picture(1, 5, 5).save(colon)
    assert open_image(str(colon)).size == (5, 5)
