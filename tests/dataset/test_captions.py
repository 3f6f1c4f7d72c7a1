"""Captions as trainers of image generators read them, and `metadata.jsonl`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from florence2.dataset.captions import check_ending
from florence2.dataset.views import ViewSettings
from florence2.dataset.writing import write_views
from florence2.errors import OptionError
from tests.dataset.rows import caption, cascade, files_below, write_rows


@pytest.fixture
def album(tmp_path: Path) -> Path:
    (tmp_path / "album" / "b").mkdir(parents=True)
    for name in ("a.jpg", "b/c.v2.png", "a.png"):
        Image.new("RGB", (200, 100)).save(tmp_path / "album" / name)
    return tmp_path / "album"


@pytest.fixture
def rows(tmp_path: Path, album: Path) -> Path:
    texts = {"a.jpg": " a cat\n", "b/c.v2.png": "größe", "gone.jpg": "nothing"}
    return write_rows(tmp_path / "rows", [caption(id, text) | {"place": str(album / id)} for id, text in texts.items()])


def test_files_in_the_tree_of_the_ids(tmp_path: Path, rows: Path) -> None:
    settings = ViewSettings(prefix="ohwx, ", suffix=" end", ext=".caption")
    write_views(rows, ["captions"], tmp_path / "out", settings=settings)
    assert files_below(tmp_path / "out" / "captions") == {
        "a.caption": b"ohwx, a cat end",
        "b/c.v2.caption": "ohwx, größe end".encode(),
        "gone.caption": b"ohwx, nothing end",
    }


def test_files_next_to_the_images(tmp_path: Path, rows: Path, album: Path) -> None:
    (album / "a.txt").write_text("mine")
    settings = ViewSettings(beside=True)
    report = write_views(rows, ["captions"], tmp_path / "out", settings=settings)
    assert (album / "a.txt").read_text() == "mine" and (album / "b" / "c.v2.txt").read_text() == "größe"
    assert not (album / "gone.txt").exists() and not report.complete
    assert report.report["captions"]["counts"] == {"images": 3, "left": 1, "missing_images": 1, "written": 1}
    write_views(rows, ["captions"], tmp_path / "out", settings=ViewSettings(beside=True, overwrite=True))
    assert (album / "a.txt").read_text() == "a cat"


def test_images_that_share_a_file_of_captions(tmp_path: Path, album: Path) -> None:
    rows = [caption(name, name) | {"place": str(album / name)} for name in ("a.png", "a.jpg")]
    settings = ViewSettings(beside=True, overwrite=True)
    report = write_views(write_rows(tmp_path / "rows", rows), ["captions"], tmp_path / "out", settings=settings)
    assert (album / "a.txt").read_text() == "a.jpg" and report.report["captions"]["counts"]["shared_names"] == 1
    assert not report.complete


def test_metadata_next_to_links(tmp_path: Path, rows: Path, album: Path) -> None:
    report = write_views(rows, ["metadata"], tmp_path / "out", settings=ViewSettings(suffix="!"))
    folder = tmp_path / "out" / "metadata"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"file_name": "a.jpg", "text": "a cat!"}, {"file_name": "b/c.v2.png", "text": "größe!"}]
    assert (folder / "b/c.v2.png").readlink() == album / "b/c.v2.png"
    assert report.report["metadata"]["counts"] == {"images": 2, "missing_images": 1}


def test_parts(tmp_path: Path, rows: Path) -> None:
    settings = ViewSettings(split={"one": 0.5, "two": 0.5})
    write_views(rows, ["metadata", "captions"], tmp_path / "out", settings=settings)
    lines = [
        [json.loads(line)["file_name"] for line in (tmp_path / part / "metadata.jsonl").read_text().splitlines()]
        for part in ("out/metadata/one", "out/metadata/two")
    ]
    assert sorted([*lines[0], *lines[1]]) == ["a.jpg", "b/c.v2.png"]
    for part, names in zip(("one", "two"), lines, strict=True):
        assert all((tmp_path / "out/metadata" / part / name).is_symlink() for name in names)
    assert len(list((tmp_path / "out/captions").rglob("*.txt"))) == 3


def test_one_text_an_image(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows", [caption("a", "one"), caption("a", "two", "<DETAILED_CAPTION>")])
    with pytest.raises(OptionError, match="'a' has 2 texts, and this view holds one an image"):
        write_views(source, ["captions"], tmp_path / "out", tasks=["caption", "detailed_caption"])
    assert not (tmp_path / "out" / "captions").exists()
    write_views(source, ["captions"], tmp_path / "out", tasks=["detailed_caption"])
    assert (tmp_path / "out/captions/a.txt").read_text() == "two"


def test_the_caption_of_a_cascade(tmp_path: Path) -> None:
    write_views(write_rows(tmp_path / "rows", [cascade("a")]), ["captions"], tmp_path / "out")
    assert (tmp_path / "out/captions/a.txt").read_text() == "a cup and a spoon"


@pytest.mark.parametrize("ext", ["txt", "", ".", ".a/b", "../x", ".jpg", ".PNG", ".averylongending", ".a.b"])
def test_wrong_endings(ext: str) -> None:
    with pytest.raises(OptionError, match="--ext is"):
        check_ending(ext)


def test_right_endings() -> None:
    check_ending(".txt")
    check_ending(".caption")
