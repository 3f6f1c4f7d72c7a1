"""YOLO trees: what Ultralytics' rules read is in the rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from florence2.dataset.images import LINKS
from florence2.dataset.views import ViewSettings
from florence2.dataset.writing import write_views
from florence2.dataset.yolo import join_rings, quote_yaml
from florence2.errors import OptionError
from tests.dataset.rows import boxes, caption, cascade, failed, files_below, polygons, quads, write_rows


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    for name in ("a.jpg", "b/c.png", "images/d.jpg", "A.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100), "red").save(folder / name)
    return folder


def at(album: Path, row: dict[str, Any]) -> dict[str, Any]:
    return row | {"place": str(album / row["id"])}


def read_labels(out: Path) -> dict[str, list[list[float]]]:
    """The labels by image, found as Ultralytics finds them: by the last /images/ of the path, and the ending."""
    labels = {}
    for image in sorted((out / "images").rglob("*.*")):
        path = "/labels/".join(str(image).rsplit("/images/", 1)).rsplit(".", 1)[0] + ".txt"
        lines = Path(path).read_text().splitlines()
        labels[image.relative_to(out / "images").as_posix()] = [list(map(float, line.split())) for line in lines]
        with Image.open(image) as opened:
            assert opened.size == (200, 100)
    return labels


def test_boxes(tmp_path: Path, album: Path) -> None:
    given = [("dog", 10.123, 20.1, 30.7, 40.9), ("cat", 0, 0, 200, 100), ("dog", 199.9, 99.9, 200, 100)]
    rows = [at(album, boxes("a.jpg", *given)), at(album, boxes("b/c.png")), at(album, boxes("images/d.jpg", given[1]))]
    report = write_views(write_rows(tmp_path / "rows", [*rows, failed("x.jpg")]), ["yolo"], tmp_path / "out")
    out = tmp_path / "out" / "yolo"
    labels = read_labels(out)
    assert list(labels) == ["train/a.jpg", "train/b/c.png", "train/images_/d.jpg"]
    assert labels["train/b/c.png"] == [] and labels["train/images_/d.jpg"] == [[1, 0.5, 0.5, 1, 1]]
    for (number, *numbers), (label, x1, y1, x2, y2) in zip(labels["train/a.jpg"], given, strict=True):
        assert number == {"dog": 0, "cat": 1}[label]
        exact = [(x1 + x2) / 400, (y1 + y2) / 200, (x2 - x1) / 200, (y2 - y1) / 100]
        assert numbers == pytest.approx(exact, abs=0.5000001e-6, rel=0)
    assert (out / "data.yaml").read_text() == (
        f'path: "{out}"\ntrain: images/train\nval: images/train\nnames:\n  0: "dog"\n  1: "cat"\n'
    )
    assert (out / "labels/train/a.txt").read_text().splitlines()[1] == "1 0.500000 0.500000 1.000000 1.000000"
    counts = {"background_images": 1, "images": 3, "objects": 4, "renamed": 1}
    assert report.report["yolo"]["counts"] == counts and report.complete
    assert (out / "images/train/a.jpg").readlink() == album / "a.jpg"


def test_images_of_the_same_name_have_labels_of_their_own(tmp_path: Path, album: Path) -> None:
    rows = [at(album, boxes(name, (name, 0, 0, 9, 9))) for name in ("a.jpg", "A.png")]
    write_views(write_rows(tmp_path / "rows", rows), ["yolo"], tmp_path / "out")
    labels = read_labels(tmp_path / "out" / "yolo")
    assert len(labels) == 2 and sorted(lines[0][0] for lines in labels.values()) == [0, 1]
    assert len({name.rsplit(".", 1)[0].casefold() for name in labels}) == 2


@pytest.mark.parametrize("link", ["hard", "copy"])
def test_images_that_are_not_links(tmp_path: Path, album: Path, link: str) -> None:
    rows = [at(album, boxes("a.jpg"))]
    settings = ViewSettings(link=link)
    write_views(write_rows(tmp_path / "rows", rows), ["yolo"], tmp_path / "out", settings=settings)
    image = tmp_path / "out/yolo/images/train/a.jpg"
    assert not image.is_symlink() and image.read_bytes() == (album / "a.jpg").read_bytes()
    assert image.samefile(album / "a.jpg") is (link == "hard")


def test_images_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    places = ["/nowhere/a.jpg", "sha256:00", "relative.jpg", "/a\0b", str(tmp_path / "folder.jpg"), "/x.tar::a.jpg"]
    rows = [boxes(f"{i}.jpg", ("dog", 1, 2, 3, 4)) | {"place": place} for i, place in enumerate(places)]
    report = write_views(write_rows(tmp_path / "rows", rows), ["yolo"], tmp_path / "out")
    assert not report.complete and report.report["yolo"]["counts"]["missing_images"] == 6
    assert len(list((tmp_path / "out/yolo/labels/train").iterdir())) == 6
    assert list((tmp_path / "out/yolo/images/train").iterdir()) == []


def test_what_the_format_cannot_hold(tmp_path: Path, album: Path) -> None:
    """Ultralytics warns of equal lines, and a size of zero is not a box."""
    same, thin = ("dog", 1, 2, 3, 4), ("dog", 1, 2, 1.00001, 50)
    rows = [at(album, boxes("a.jpg", same, ("cat", 1, 2, 3, 4), same, thin))]
    report = write_views(write_rows(tmp_path / "rows", rows), ["yolo"], tmp_path / "out")
    assert [line[0] for line in read_labels(tmp_path / "out/yolo")["train/a.jpg"]] == [0, 1]
    counts = report.report["yolo"]["counts"]
    assert (counts["duplicates"], counts["too_small"], counts["objects"]) == (1, 1, 2)


def test_parts(tmp_path: Path, album: Path) -> None:
    rows = write_rows(tmp_path / "rows", [at(album, boxes(name)) for name in ("a.jpg", "b/c.png", "A.png")])
    settings = ViewSettings(split={"train": 0.5, "val": 0.3, "test": 0.2})
    write_views(rows, ["yolo"], tmp_path / "out", settings=settings)
    lines = (tmp_path / "out/yolo/data.yaml").read_text().splitlines()
    assert lines[1:4] == ["train: images/train", "val: images/val", "test: images/test"]
    for part in settings.split:
        assert (tmp_path / "out/yolo/images" / part).is_dir() and (tmp_path / "out/yolo/labels" / part).is_dir()
    with pytest.raises(OptionError, match="needs the parts train and val"):
        write_views(rows, ["yolo"], tmp_path / "out", settings=ViewSettings(split={"train": 0.5, "test": 0.5}))


def test_outlines(tmp_path: Path, album: Path) -> None:
    """A point less than three has no area; several rings become one path; a box without an outline is counted."""
    rings = [[0, 0, 40, 0, 40, 40, 0, 40], [50, 0, 90, 0, 90, 40], [1, 1, 2, 2]]
    rows = [at(album, polygons("a.jpg", ("cup", rings))), at(album, cascade("b/c.png"))]
    tasks = ["<REFERRING_EXPRESSION_SEGMENTATION>", "cascade"]
    report = write_views(write_rows(tmp_path / "rows", rows), ["yolo-seg"], tmp_path / "out", tasks=tasks)
    labels = read_labels(tmp_path / "out/yolo-seg")
    ((number, *numbers),) = labels["train/a.jpg"]
    points = list(zip(numbers[0::2], numbers[1::2], strict=True))
    joined = [(0, 0), (40, 0), (50, 0), (90, 0), (90, 40), (50, 0), (40, 0), (40, 40), (0, 40)]
    assert number == 0 and points == [(x / 200, y / 100) for x, y in joined]
    assert labels["train/b/c.png"] == [[1, 0, 0, 0.25, 0, 0.25, 0.5]]
    counts = report.report["yolo-seg"]["counts"]
    assert (counts["degenerate_rings"], counts["without_outline"], counts["objects"]) == (1, 1, 2)


def test_oriented_boxes(tmp_path: Path, album: Path) -> None:
    corners = [10, 20, 110, 30, 108, 50, 8, 40]
    rows = [at(album, quads("a.jpg", ("STOP", corners), ("GO", [0, 0, 200, 0, 200, 100, 0, 100])))]
    write_views(write_rows(tmp_path / "rows", rows), ["yolo-obb"], tmp_path / "out")
    first, second = read_labels(tmp_path / "out/yolo-obb")["train/a.jpg"]
    assert first == [0, *(value / (100 if i % 2 else 200) for i, value in enumerate(corners))]
    assert second == [0, 0, 0, 1, 0, 1, 1, 0, 1]
    assert '0: "text"' in (tmp_path / "out/yolo-obb/data.yaml").read_text()


def test_join_rings() -> None:
    down = join_rings([[0, 0, 0, 50, 10, 50], [1, 90, 1, 60, 5, 90]])  # nearest by both coordinates
    assert down == [(0, 0), (0, 50), (1, 60), (5, 90), (1, 90), (1, 60), (0, 50), (10, 50)]
    assert join_rings([]) == [] and join_rings([[1, 2, 3, 4, 5, 6]]) == [(1, 2), (3, 4), (5, 6)]


@pytest.mark.parametrize("name", ["a: b #c", 'say "x"', "- x", "no", "1.5", "ä\u2028\x85", "\x00\n", "", "🐕 dog"])
def test_names_in_yaml(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(f"names:\n  0: {quote_yaml(name)}\n") == {"names": {0: name}}
    assert yaml.safe_load(quote_yaml("\ud800")) == "\ufffd"


@pytest.mark.parametrize("link", LINKS)
def test_a_photo_that_is_a_symbolic_link(tmp_path: Path, link: str) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "1.jpg").write_bytes(b"a photo")
    photo = tmp_path / "photo.jpg"
    photo.symlink_to("store/1.jpg")
    source = write_rows(tmp_path / "rows", [boxes("photo.jpg") | {"place": str(photo)}])
    write_views(source, ["yolo"], tmp_path / "out", settings=ViewSettings(link=link))
    assert (tmp_path / "out/yolo/images/train/photo.jpg").read_bytes() == b"a photo"


def test_images_of_tables_become_files(tmp_path: Path) -> None:
    """Those that cannot be read are missing; nothing is read from a table that is gone."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [b"\xff\xd8 a", None, b"\x89PNG b", b"other"] + [b"BM%d" % number for number in range(20)]
    parquet.write_table(pyarrow.table({"image": images}), tmp_path / "t.parquet", row_group_size=3)
    places = [f"{tmp_path / 't.parquet'}::{number}" for number in range(24)] + ["/gone/u.parquet::0"]
    rows = [make(str(number)) | {"place": place} for number, place in enumerate(places) for make in (boxes, a_caption)]
    rows.append(boxes("second-id") | {"place": places[0]})
    report = write_views(write_rows(tmp_path / "rows", rows), ["yolo", "metadata"], tmp_path / "out").report
    for view, folder in (("yolo", "images/train/"), ("metadata", "")):
        files = files_below(tmp_path / "out" / view)
        written = {name: files[f"{folder}{name}"] for name in ("0.jpg", "2.png", "3.image", "23.bmp")}
        assert list(written.values()) == [images[0], images[2], images[3], images[23]]
        assert report[view]["counts"]["missing_images"] == 2
    assert files_below(tmp_path / "out")["yolo/images/train/second-id.jpg"] == images[0]
    lines = (tmp_path / "out/metadata/metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines[:3]] == ["0.jpg", "2.png", "3.image"] and len(lines) == 23


def a_caption(id: str) -> dict[str, object]:
    return caption(id, "a text")
