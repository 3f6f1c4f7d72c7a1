"""Tars of samples: the keys and the order of the input, the same bytes every time."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from florence2.dataset import webdataset
from florence2.dataset.views import ViewSettings
from florence2.dataset.writing import write_views
from tests.dataset.rows import boxes, caption, files_below, write_rows

WITH_IMAGES = ViewSettings(with_images=True)


def png(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (200, 100), colour).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 12345
            tar.addfile(info, io.BytesIO(data))
    return path


def read_tar(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        assert all(info.mtime == info.uid == info.gid == 0 and not info.uname for info in tar)
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def in_tar(tar: Path, name: str, row: dict[str, Any]) -> dict[str, Any]:
    return row | {"place": f"{tar}::{name}"}


def test_a_tar_for_each_input_tar(tmp_path: Path) -> None:
    """The order is that of the input, not of the rows nor of the ids; what rows say is not read from other members."""
    members = [("z.v1/b.png", png("red")), ("z.v1/b.json", b"{}"), ("a.png", png("blue")), ("c.jpg", b"not labelled")]
    tar = write_tar(tmp_path / "in" / "shard-7.tar", members)
    rows = [in_tar(tar, "a.png", caption("a", " two\n")), in_tar(tar, "z.v1/b.png", boxes("z.v1/b", ("x", 1, 2, 3, 4)))]
    source = write_rows(tmp_path / "rows", rows)
    report = write_views(source, ["webdataset"], tmp_path / "out", settings=WITH_IMAGES)
    written = read_tar(tmp_path / "out" / "webdataset" / "shard-7.tar")
    assert [name for name, _ in written] == [
        "z.v1/b.png",
        "z.v1/b.florence2.json",
        "a.png",
        "a.florence2.json",
        "a.txt",
    ]
    contents = dict(written)
    assert contents["z.v1/b.png"] == png("red") and contents["a.txt"] == b"two"
    (row,) = json.loads(contents["z.v1/b.florence2.json"])
    assert row["boxes"][0]["label"] == "x" and row["id"] == "z.v1/b" and "place" not in row
    assert report.report["webdataset"]["counts"] == {"images": 2, "samples": 2, "tars": 1} and report.complete
    first = files_below(tmp_path / "out")
    write_views(source, ["webdataset"], tmp_path / "out", settings=WITH_IMAGES)
    assert files_below(tmp_path / "out") == first


def test_samples_of_several_images_and_questions(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("k.left.png", png("red")), ("k.right.png", png("blue"))])
    rows = [in_tar(tar, "k.left.png", caption("k", "left")), in_tar(tar, "k.left.png", boxes("k"))]
    rows += [in_tar(tar, "k.right.png", caption("k.right.png", "right"))]
    write_views(write_rows(tmp_path / "rows", rows), ["webdataset"], tmp_path / "out", settings=WITH_IMAGES)
    written = read_tar(tmp_path / "out" / "webdataset" / "x.tar")
    assert [name for name, _ in written] == ["k.left.png", "k.right.png", "k.florence2.json"]  # two texts are no .txt
    assert [row["task"] for row in json.loads(written[2][1])] == ["<CAPTION>", "<OD>", "<CAPTION>"]


def test_tars_of_the_same_name_and_tars_that_are_gone(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / folder / "x.tar", [("k.png", png("red"))]) for folder in "ab"]
    rows = [in_tar(tar, "k.png", boxes(f"{tar.parent.name}/k")) for tar in tars]
    rows.append(in_tar(Path("/gone/y.tar"), "k.png", boxes("y/k")))
    report = write_views(write_rows(tmp_path / "rows", rows), ["webdataset"], tmp_path / "out", settings=WITH_IMAGES)
    tars = sorted((tmp_path / "out" / "webdataset").iterdir())
    assert len(tars) == 3 and [tar.name[:2] for tar in tars] == ["x-", "x.", "y."]
    assert [name for name, _ in read_tar(tars[2])] == ["k.florence2.json"]
    assert report.report["webdataset"]["counts"]["missing_images"] == 1 and not report.complete


def test_images_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "SAMPLES_OF_TAR", 2)
    (tmp_path / "a.b.png").write_bytes(png("red"))
    rows = [boxes(name) | {"place": str(tmp_path / name)} for name in ("a.b.png", "c.png", "d/e.png")]
    report = write_views(write_rows(tmp_path / "rows", rows), ["webdataset"], tmp_path / "out", settings=WITH_IMAGES)
    folder = tmp_path / "out" / "webdataset"
    assert [name for name, _ in read_tar(folder / "images-00000.tar")] == [
        *("a_b.png", "a_b.florence2.json", "c.florence2.json")
    ]
    assert [name for name, _ in read_tar(folder / "images-00001.tar")] == ["d/e.florence2.json"]
    assert len(list(folder.iterdir())) == 2 and report.report["webdataset"]["counts"]["missing_images"] == 2


@pytest.mark.parametrize("name", ["../../x.png", "/etc/x.png", "a/../../x.png", "a\0b.png", "\udcff.png", "..png"])
def test_hostile_names(tmp_path: Path, name: str) -> None:
    source = write_rows(tmp_path / "rows", [])
    (source / "results.jsonl").write_text(json.dumps(in_tar(Path("/gone/x.tar"), name, boxes("a"))) + "\n")
    write_views(source, ["webdataset"], tmp_path / "out")
    ((written, _),) = read_tar(tmp_path / "out" / "webdataset" / "x.tar")
    assert not written.startswith("/") and ".." not in written.split("/") and written.endswith(".florence2.json")


def test_yolo_unpacks_images_of_tars(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a/k.png", png("red")), ("gone.png", b"")])
    rows = [in_tar(tar, "a/k.png", boxes("a/k", ("x", 0, 0, 200, 100))), in_tar(tar, "other.png", boxes("b"))]
    report = write_views(write_rows(tmp_path / "rows", rows), ["yolo"], tmp_path / "out")
    files = files_below(tmp_path / "out" / "yolo")
    assert files["images/train/a/k.png"] == png("red") and files["labels/train/a/k.txt"].startswith(b"0 0.5")
    assert report.report["yolo"]["counts"]["missing_images"] == 1


def test_an_image_with_two_ids_keeps_the_rows_of_both(tmp_path: Path) -> None:
    """Its tar was labelled alone, and again with others."""
    tar = write_tar(tmp_path / "0.tar", [("a.png", png("red"))])
    rows = [in_tar(tar, "a.png", caption(id, id)) for id in ("a", "0/a")]
    source = write_rows(tmp_path / "rows", rows)
    write_views(source, ["webdataset"], tmp_path / "out", settings=WITH_IMAGES)
    image, (_, data) = read_tar(tmp_path / "out" / "webdataset" / "0.tar")
    assert image == ("a.png", png("red")) and [row["id"] for row in json.loads(data)] == ["0/a", "a"]


def test_the_ending_of_a_tar_may_have_capitals(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.TAR", [("a.png", png("red"))])
    source = write_rows(tmp_path / "rows", [in_tar(tar, "a.png", boxes("a", ("x", 1, 2, 3, 4)))])
    report = write_views(source, ["yolo", "webdataset"], tmp_path / "out", settings=WITH_IMAGES)
    assert report.complete and (tmp_path / "out/yolo/images/train/a.png").read_bytes() == png("red")
    assert [name for name, _ in read_tar(tmp_path / "out/webdataset/0.tar")] == ["a.png", "a.florence2.json"]


def test_a_name_that_a_tar_repeats_keeps_its_ending(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", [("a.png", png("red")), ("b.png", png("red")), ("a.png", png("blue"))])
    rows = [in_tar(tar, "a.png", caption("a", "red")), in_tar(tar, "a.png-2", caption("a-2", "blue"))]
    source = write_rows(tmp_path / "rows", rows)
    report = write_views(source, ["metadata", "webdataset"], tmp_path / "out", settings=WITH_IMAGES)
    assert report.complete and (tmp_path / "out/metadata/a-2.png").read_bytes() == png("blue")
    assert dict(read_tar(tmp_path / "out/webdataset/0.tar"))["a.png"] == png("blue")


def test_a_tar_that_is_named_as_ours_keeps_its_rows(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "in" / "images-00000.tar", [("k.png", png("red"))])
    rows = [in_tar(tar, "k.png", boxes("k")), boxes("loose.png")]
    report = write_views(write_rows(tmp_path / "rows", rows), ["webdataset"], tmp_path / "out")
    tars = sorted((tmp_path / "out" / "webdataset").iterdir())
    assert [name for path in tars for name, _ in read_tar(path)] == ["k.florence2.json", "loose.florence2.json"]
    assert report.report["webdataset"]["counts"]["tars"] == 2


def test_each_part_of_a_split_has_the_names_of_the_input(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "in" / "shard.tar", [(f"{number}.png", png("red")) for number in range(20)])
    rows = [in_tar(tar, f"{number}.png", caption(f"{number}", "a text")) for number in range(20)]
    rows += [caption(f"loose-{number}", "a text") for number in range(20)]
    settings = ViewSettings(split={"train": 0.5, "val": 0.5})
    write_views(write_rows(tmp_path / "rows", rows), ["webdataset"], tmp_path / "out", settings=settings)
    written = {path.relative_to(tmp_path / "out" / "webdataset").as_posix() for path in tmp_path.glob("out/*/*/*.tar")}
    assert written == {f"{part}/{name}.tar" for part in ("train", "val") for name in ("shard", "images-00000")}
