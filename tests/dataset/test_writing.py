"""Views are written whole or not at all, the same bytes every time, and never outside their folder."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from florence2.bulk.lock import FolderLock
from florence2.bulk.sources import DATASET_MARK, find_images
from florence2.dataset import writing
from florence2.dataset.views import ViewSettings
from florence2.dataset.writing import VIEWS, write_views
from florence2.errors import OptionError
from tests.dataset.rows import boxes, caption, failed, files_below, quads, row, write_rows
from tests.dataset.test_names import HOSTILE

EVERY = list(VIEWS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rows for every view: boxes, texts of images, and text with regions."""
    (tmp_path / "album").mkdir()
    rows = []
    for i in range(12):
        place = tmp_path / "album" / f"{i}.png"
        Image.new("RGB", (200, 100), (i, 0, 0)).save(place)
        box, corners = (f"label {i % 3}", i, 0, 100 + i, 50), [1, 1, 50, 1, 50, 20, 1, 20 + i]
        rows += [each | {"place": str(place)} for each in (boxes(place.name, box), caption(place.name, f"text {i}"))]
        rows.append(quads(place.name, (str(i), corners)) | {"place": str(place)})
    return write_rows(tmp_path / "rows", [*rows, failed("x.png")])


def write_every(source: Path, out: Path, **settings: object) -> None:
    for names in (["coco", "coco-results", "coco-captions", "yolo", "captions", "metadata"], ["yolo-obb", "yolo-seg"]):
        tasks = ["ocr_with_region"] if "yolo-obb" in names else ["od", "caption"]
        write_views(source, names, out, tasks=tasks, settings=ViewSettings(**settings))  # type: ignore[arg-type]
    write_views(source, ["csv", "parquet", "webdataset"], out, settings=ViewSettings(**settings))  # type: ignore[arg-type]


def test_a_second_call_gives_the_same_bytes(tmp_path: Path, source: Path) -> None:
    settings = {"split": {"train": 0.5, "val": 0.5}, "classes": ["label 1"], "min_confidence": 0.2}
    write_every(source, tmp_path / "out", **settings)
    first = files_below(tmp_path / "out")
    assert {name.split("/")[0] for name in first} == {*EVERY, "report.json", ".lock", DATASET_MARK}
    write_every(source, tmp_path / "out", **settings)
    assert files_below(tmp_path / "out") == first


def test_shards_and_rows_in_another_order_give_the_same_bytes(tmp_path: Path, source: Path) -> None:
    lines = (source / "results.jsonl").read_text().splitlines(keepends=True)
    groups = [lines[start : start + 3] for start in range(0, len(lines), 3)]
    sharded = tmp_path / "shards"
    sharded.mkdir()
    for shard in (1, 2):
        mine = [line for group in reversed(groups[shard - 1 :: 2]) for line in group]
        (sharded / f"results.{shard}-of-2.jsonl").write_text("".join(mine))
    write_every(source, tmp_path / "one")
    write_every(sharded, tmp_path / "two")
    one, two = files_below(tmp_path / "one"), files_below(tmp_path / "two")
    places = [name for name in one if name.endswith(("report.json", "data.yaml"))]  # they name the folders
    assert len(places) == 4 and one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} == set(places)


def test_reports_of_all_views_are_kept(tmp_path: Path, source: Path) -> None:
    write_views(source, ["coco"], tmp_path / "out", tasks=["od"])
    write_views(source, ["yolo"], tmp_path / "out", tasks=["od"])
    write_views(source, ["coco"], tmp_path / "out", tasks=["ocr_with_region"])
    report = json.loads((tmp_path / "out" / "report.json").read_bytes())
    assert list(report) == ["coco", "yolo"]
    assert report["coco"]["tasks"] == ["<OCR_WITH_REGION>"] and report["yolo"]["tasks"] == ["<OD>"]
    assert report["yolo"]["read"] == {
        **{"rows": 37, "failed": 1, "replaced": 0, "damaged_lines": 0, "unfinished_lines": 0},
    }
    assert report["yolo"]["errors"] == [{"id": "x.png", "task": "<OD>", "error": "x.png cannot be read."}]


def test_an_earlier_view_is_replaced_wholly(tmp_path: Path, source: Path) -> None:
    write_views(source, ["yolo"], tmp_path / "out", tasks=["od"])
    (tmp_path / "out" / "yolo" / "labels" / "train.cache").write_bytes(b"of labels that are no more")
    write_rows(source, [boxes("other.png")])
    write_views(source, ["yolo"], tmp_path / "out")
    assert sorted(files_below(tmp_path / "out" / "yolo")) == ["data.yaml", "labels/train/other.txt"]


def test_a_view_that_fails_leaves_the_earlier_one(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_views(source, ["coco", "yolo"], tmp_path / "out", tasks=["od"])
    first = files_below(tmp_path / "out")
    settings = ViewSettings(classes=["label 0", "label 1"], unmatched="error")
    with pytest.raises(OptionError, match="'label 2' fits none of the 2 classes"):
        write_views(source, ["coco", "yolo"], tmp_path / "out", tasks=["od"], settings=settings)
    assert files_below(tmp_path / "out") == first

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_SHOWN_EVERY", 5)
    with pytest.raises(KeyboardInterrupt):
        write_views(source, ["coco", "yolo", "csv"], tmp_path / "out", tasks=["od"], progress=stop)
    assert files_below(tmp_path / "out") == first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        DATASET_MARK,
        ".lock",
        "coco",
        "report.json",
        "yolo",
    ]


def test_what_a_killed_call_left(tmp_path: Path, source: Path) -> None:
    """A folder half written, and one of the two renamings that put a view in its place."""
    out = tmp_path / "out"
    write_views(source, ["coco"], out, tasks=["od"])
    first = files_below(out)
    (out / "coco").rename(out / ".coco.old")
    (out / ".coco.part").mkdir()
    (out / ".coco.part" / "instances.json").write_text("[")
    write_views(source, ["coco"], out, tasks=["od"])
    assert files_below(out) == first


def test_a_call_that_was_killed_before_its_last_view_can_be_repeated(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap, left = writing._swap, iter(["coco"])

    def stop_after_the_first(out: Path, name: str) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        swap(out, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing, "_swap", stop_after_the_first)
        write_views(source, ["coco", "yolo"], tmp_path / "out", tasks=["od"])
    write_views(source, ["coco", "yolo"], tmp_path / "out", tasks=["od"])
    assert (tmp_path / "out" / "yolo" / "data.yaml").exists()


def test_a_folder_of_somebody_else_stays(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out" / "yolo").mkdir(parents=True)
    write_views(source, ["yolo"], tmp_path / "out", tasks=["od"])  # an empty folder holds nothing to lose
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out" / "yolo").mkdir(parents=True)
    (tmp_path / "out" / "yolo" / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="yolo exists and was not written by this command"):
        write_views(source, ["coco", "yolo"], tmp_path / "out", tasks=["od"])
    assert (tmp_path / "out" / "yolo" / "mine.txt").read_text() == "mine"
    (tmp_path / "out" / "report.json").write_text("[")
    with pytest.raises(OptionError, match="was not written by this command"):
        write_views(source, ["yolo"], tmp_path / "out", tasks=["od"])


def test_one_call_at_a_time(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    with FolderLock(tmp_path / "out"), pytest.raises(OptionError, match="Another run is writing to"):
        write_views(source, ["csv"], tmp_path / "out")


def test_hostile_ids_write_nothing_outside(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (200, 100)).save(image)
    rows = [boxes("") | {"id": id_, "place": str(image)} for id_ in HOSTILE]
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    before = sorted(path.name for path in tmp_path.iterdir())
    settings = ViewSettings(split={"train": 0.5, "val": 0.5}, with_images=True)
    views = ["coco", "coco-results", "yolo", "csv", "parquet", "webdataset"]
    write_views(folder, views, tmp_path / "in" / "out", settings=settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "in"])
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "in" / "out").iterdir()} == {*views, "report.json", ".lock", DATASET_MARK}
    labels = list((tmp_path / "in" / "out" / "yolo" / "labels").rglob("*.txt"))
    assert len(labels) == len(HOSTILE)


def test_damaged_rows_are_counted(tmp_path: Path) -> None:
    wrong = [row("a", kind="boxes", text="", image_size=[9, 9], boxes=[{"xyxy": [1, 2]}]), boxes("b", image_size="x")]
    rows = [*wrong, boxes("c", ("dog", 1, 2, 3, 4)), boxes("d", ("dog", 1, 2, 3, 4), boxes=7)]
    report = write_views(write_rows(tmp_path / "rows", rows), ["coco", "yolo", "csv"], tmp_path / "out")
    for name in ("coco", "yolo", "csv"):
        assert report.report[name]["counts"]["damaged_rows"] == 3
    assert json.loads((tmp_path / "out/coco/instances.json").read_bytes())["images"] == [
        {"id": 3, "file_name": "c", "width": 200, "height": 100}
    ]
    assert not report.complete and "coco: 3 rows with damaged values were left out." in report.notes


def test_answers_about_another_size_of_the_image_are_left_out(tmp_path: Path) -> None:
    old = boxes("a", ("old", 1, 2, 3, 4), task="<DENSE_REGION_CAPTION>", image_size=[100, 100])
    source = write_rows(tmp_path / "rows", [old, boxes("a", ("new", 1, 2, 3, 4))])
    report = write_views(source, ["coco"], tmp_path / "out", tasks=["od", "dense_region_caption"])
    values = json.loads((tmp_path / "out/coco/instances.json").read_bytes())
    assert [each["name"] for each in values["categories"]] == ["new"]
    assert report.report["coco"]["counts"]["outdated_rows"] == 1


def test_a_full_disk_is_one_sentence_and_the_earlier_view_stays(tmp_path: Path, source: Path) -> None:
    write_views(source, ["coco"], tmp_path / "out", tasks=["od"])
    first = files_below(tmp_path / "out")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); from florence2.cli.main import main; "
        "sys.exit(main(['dataset', 'rows', '--to', 'coco,csv', '--task', 'od', '--out', 'out']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("florence2: out cannot be written: File too large. Make room on the disk")
    assert files_below(tmp_path / "out") == first


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="file is a file; a dataset needs a folder"):
        write_views(source, ["csv"], tmp_path / "file")


@pytest.mark.parametrize("link", ["symlink", "copy"])
def test_a_dataset_in_the_labelled_folder_is_not_labelled(tmp_path: Path, link: str) -> None:
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.new("RGB", (200, 100)).save(photo)
    source = write_rows(tmp_path / "rows", [boxes("a.png") | {"place": str(photo)}])
    write_views(source, ["yolo"], photo.parent / "dataset", settings=ViewSettings(link=link))
    assert (photo.parent / "dataset/yolo/images/train/a.png").exists()
    assert [image.data for image in find_images([str(photo.parent)])] == [photo]


def test_images_of_a_folder_that_was_moved(tmp_path: Path) -> None:
    """Only those that are not at their places; ids are the paths below the folder that was labelled."""
    for path in ("new/a/1.png", "new/b.png", "old/b.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    ids = ("a/1.png", "b.png", "gone.png")
    rows = [
        make(id) | {"place": str(tmp_path / "old" / id)} for id in ids for make in (boxes, partial(caption, text="a"))
    ]
    source = write_rows(tmp_path / "rows", rows)
    views = ["yolo", "metadata", "captions", "webdataset"]
    settings = ViewSettings(images=tmp_path / "new", with_images=True, beside=True)
    report = write_views(source, views, tmp_path / "out", settings=settings)
    assert {part["counts"]["missing_images"] for part in report.report.values()} == {1}
    assert report.report["yolo"]["settings"]["images"] == str(tmp_path / "new")
    files = files_below(tmp_path / "out")
    assert files["yolo/images/train/a/1.png"] == files["metadata/a/1.png"] == b"new/a/1.png"
    assert files["yolo/images/train/b.png"] == b"old/b.png" and b"new/a/1.png" in files["webdataset/images-00000.tar"]
    assert (tmp_path / "new/a/1.txt").read_text() == "a" and (tmp_path / "old/b.txt").exists()
