"""Keys of images: by content, read again only after a change."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from florence2.errors import ImageError
from florence2.processor import Processor
from florence2.train.store.keys import ImageKeys
from parity.recipe import make_picture


@pytest.fixture
def file(tmp_path: Path) -> Path:
    make_picture(1, 40, 30).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_key_is_of_the_content(processor: Processor, file: Path, tmp_path: Path) -> None:
    keys = ImageKeys(processor)
    shutil.copy(file, tmp_path / "b.png")
    make_picture(2, 40, 30).save(tmp_path / "c.png")
    assert len(keys(file)) == 32 and set(keys(file)) <= set("0123456789abcdef")
    assert keys(tmp_path / "b.png") == keys(file) == keys(str(file)) != keys(tmp_path / "c.png")


def test_a_file_is_read_again_after_a_change_alone(processor: Processor, file: Path, monkeypatch) -> None:
    keys = ImageKeys(processor)
    before = keys(file)
    reads: list[Path] = []
    plain = Path.open

    def noted(self: Path, *rest: Any) -> Any:
        reads.append(self)
        return plain(self, *rest)

    monkeypatch.setattr(Path, "open", noted)
    assert keys(file) == before and not reads
    status = file.stat()
    make_picture(2, 40, 30).save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert keys(file) != before and reads == [file]


def test_other_images_are_known_by_their_pixels(processor: Processor, file: Path) -> None:
    """Of the same bytes in another shape, too."""
    keys = ImageKeys(processor)
    image = make_picture(1, 40, 30)
    assert keys(image) == keys(image.copy()) == keys(file.read_bytes()) != keys(make_picture(2, 40, 30))
    assert keys(image) != keys(Image.frombytes("RGB", (30, 40), image.tobytes()))


def test_what_cannot_be_read_is_one_sentence(processor: Processor, tmp_path: Path) -> None:
    keys = ImageKeys(processor)
    for name in ("gone.png", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(ImageError):
            keys(tmp_path / name)
    with pytest.raises(ImageError, match="is a URL"):
        keys("https://example.org/a.png")
