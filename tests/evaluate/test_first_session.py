"""A user's first session: files in the wrong place, not unpacked to the end, or changed on the way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from florence2.evaluate.answers import missing_images
from florence2.evaluate.tables.catalogue import TABLES, find_split, read_table
from florence2.evaluate.tables.example import TableError
from tests.evaluate.test_command import NANO, evaluate, rows_of
from tests.release import keep

Capture = pytest.CaptureFixture[str]


def links(data: Path, folder: Path) -> Path:
    """A folder of the data whose files can be replaced: links to those of `data`."""
    for path in data.rglob("*"):
        target = folder / path.relative_to(data)
        target.mkdir(parents=True, exist_ok=True) if path.is_dir() else target.symlink_to(path)
    return folder


def command(table: str, data: Path, out: Path, *more: object) -> int:
    return evaluate(table, "--data", data, "--out", out, "--limit", 2, *NANO, *more)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("florence2.loading.load", refuse)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.usefixtures("no_model")
def test_wrong_folders(table: str, data: Path, tmp_path: Path, capsys: Capture) -> None:
    assert command(table, tmp_path / "nowhere", tmp_path / "out") == 2
    assert f"{tmp_path}/nowhere is not a folder; give the one that holds the files" in capsys.readouterr().err
    assert command(table, data / "coco", tmp_path / "out") == 2  # one level too deep
    assert "does not exist; its owners publish it (about" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.usefixtures("no_model")
def test_a_folder_without_any_of_its_images(table: str, data: Path, tmp_path: Path, capsys: Capture) -> None:
    """Such as one that was unpacked into a folder of its own name: every answer would be an error."""
    folder = links(data, tmp_path / "data")
    for image in {example.image.parent for example in read_table(table, folder)}:
        image.rename(tmp_path / "moved")
        image.mkdir()
        (tmp_path / "moved").rename(image / image.name)
    assert command(table, folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"florence2: None of the 2 images of {table}:") and "put them there, or check" in error
    assert not (tmp_path / "out").exists()


def test_one_missing_image_is_named_at_once_and_asked_about_later(data: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = links(data, tmp_path / "data")
    image = read_table("nocaps", folder)[1].image
    image.rename(tmp_path / "kept")
    assert command("nocaps", folder, tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith(
        f"florence2: Missing images of nocaps:val: 1 of 2, such as {image}; questions about them count as wrong"
    )
    (tmp_path / "kept").rename(image)
    assert command("nocaps", folder, tmp_path / "out") == 0
    assert "Missing" not in capsys.readouterr().err
    assert len(rows_of(tmp_path / "out" / "nocaps-val")) == 2


def test_missing_images_are_counted_once(data: Path, tmp_path: Path) -> None:
    examples = read_table("refcoco:testA", data)
    assert missing_images(examples) == ([], 3)
    folder = links(data, tmp_path)
    (folder / examples[0].image.relative_to(data)).unlink()
    missing, count = missing_images(read_table("refcoco:testA", folder))
    assert (missing, count) == ([folder / examples[0].image.relative_to(data)], 3)


@pytest.mark.parametrize("table", TABLES)
def test_a_file_that_is_cut_off_is_refused(table: str, data: Path, tmp_path: Path) -> None:
    files = [name for file in find_split(table)[3].files if (data / (name := file.path)).is_file()]
    for name in files:
        folder = links(data, tmp_path / name.replace("/", "-"))
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(content[: len(content) // 2] if not name.endswith(".txt") else b"")
        with pytest.raises(TableError) as error:
            read_table(table, folder)
        message = str(error.value)
        assert (str(folder / name) in message or "hold no examples" in message) and message.endswith(".")


@pytest.mark.parametrize("table", keep([1], ["coco-detection", "refcoco:testA", "refcoco-res:testA"]))
def test_images_of_another_size_are_named(table: str, data: Path, tmp_path: Path) -> None:
    folder = links(data, tmp_path / "data")
    image = read_table(table, folder)[0].image
    pixels = Image.open(image).reduce(2)
    image.unlink()
    pixels.save(image)
    assert evaluate(table, "--data", folder, "--out", tmp_path / "out", "--limit", 1, *NANO) == 0
    assert f" whose size is not the one in its files: 1, such as {image}; " in notes(tmp_path / "out")
    image.unlink()
    shutil.copy(data / image.relative_to(folder), image)
    assert evaluate(table, "--data", folder, "--out", tmp_path / "out", "--limit", 1, *NANO) == 0
    assert "whose size" not in notes(tmp_path / "out")


def notes(out: Path) -> str:
    values: dict[str, Any] = json.loads((out / "report.json").read_text())
    return "\n".join(values["notes"])
