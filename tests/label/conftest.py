"""Rows without a model, and small images."""

from pathlib import Path

import pytest

from florence2.answers.answer import Answer
from florence2.bulk.rows import Row, TaskQuestion
from florence2.bulk.sources import Source
from florence2.errors import ImageError
from parity.recipe import make_picture

ASKED = TaskQuestion("<CAPTION>")


def row(name: str, text: str | None = "a car", version: tuple[int, int, int] | None = None) -> Row:
    """A row about an image of this name; without a text, an error."""
    source = Source(name, Path("/images", name), name, id=name)
    if text is None:
        return Row(source, ASKED, error=str(ImageError(f"{name} is broken.")))
    return Row(source, ASKED, Answer("<CAPTION>", "text", text, text, (40, 30)), version=version)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve small images, of which the fourth is broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        make_picture(number, 40, 30).save(folder / f"{number:02}.png")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:100])
    return folder
