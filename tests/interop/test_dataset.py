"""Datasets are read by the tools they are for: supervision, webdataset and datasets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from florence2.dataset.tables import to_columns
from florence2.dataset.views import ViewSettings
from florence2.dataset.writing import write_views
from tests.dataset.rows import boxes, caption, polygons, quads, write_rows
from tests.dataset.test_webdataset import WITH_IMAGES, in_tar, png, write_tar

# without OpenCV supervision warns, at its first import, that it uses NumPy in its place
pytestmark = pytest.mark.filterwarnings("ignore:OpenCV")

SIZE = np.array([200, 100, 200, 100])
NAMES = ("a.png", "b/c.png", "d.png")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "album" / name).write_bytes(png("red"))
    return tmp_path / "album"


@pytest.fixture
def rows(album: Path) -> list[dict[str, Any]]:
    """Boxes as models write them, in float32; the last image has none."""
    rng = np.random.default_rng(1)
    corners = np.sort(rng.random((2, 5, 2, 2)), axis=2).reshape(2, 5, 4) * SIZE
    found = corners.astype(np.float32).tolist()
    labelled = [[(f"label {i % 3}", *box, 0.25 + i / 8) for i, box in enumerate(image)] for image in found]
    answers = [boxes(name, *image) for name, image in zip(NAMES, [*labelled, []], strict=True)]
    return [row | {"place": str(album / row["id"])} for row in answers]


def supervision_dataset(kind: str, *arguments: str, **settings: Any) -> Any:
    import supervision

    return getattr(supervision.DetectionDataset, f"from_{kind}")(*arguments, **settings)


def by_name(dataset: Any, folder: Path) -> dict[str, Any]:
    return {Path(path).relative_to(folder).as_posix(): found for path, found in dataset.annotations.items()}


def test_supervision_reads_coco(tmp_path: Path, album: Path, rows: list[dict[str, Any]]) -> None:
    write_views(write_rows(tmp_path / "rows", rows), ["coco"], tmp_path / "out")
    dataset = supervision_dataset("coco", str(album), str(tmp_path / "out/coco/instances.json"))
    assert dataset.classes == ["label 0", "label 1", "label 2"] and len(dataset) == 3
    found = by_name(dataset, album)
    for row in rows:
        exact = np.array([box["xyxy"] for box in row["boxes"]]).reshape(-1, 4)
        assert np.allclose(found[row["id"]].xyxy, exact, rtol=1e-6)  # supervision adds up in float32
        names = [dataset.classes[number] for number in found[row["id"]].class_id]
        assert names == [box["label"] for box in row["boxes"]]


def test_supervision_reads_outlines(tmp_path: Path, album: Path) -> None:
    rings = [[[10.0, 10.0, 60.0, 10.0, 60.0, 50.0, 10.0, 50.0]], [[100.0, 20.0, 140.0, 20.0, 140.0, 60.0]]]
    row = polygons("a.png", *[(f"label {i}", outline) for i, outline in enumerate(rings)])
    row["place"] = str(album / "a.png")
    write_views(write_rows(tmp_path / "rows", [row]), ["coco", "yolo-seg"], tmp_path / "out")
    coco = supervision_dataset("coco", str(album), str(tmp_path / "out/coco/instances.json"), force_masks=True)
    tree = tmp_path / "out" / "yolo-seg"
    yolo = read_yolo(tree, force_masks=True)
    (of_coco,), (of_yolo,) = coco.annotations.values(), yolo.annotations.values()
    assert of_coco.mask.shape == of_yolo.mask.shape == (2, 100, 200)
    assert of_coco.mask.sum(axis=(1, 2)) == pytest.approx([2000, 800], rel=0.1)
    assert of_yolo.mask.sum(axis=(1, 2)) == pytest.approx([2000, 800], rel=0.1)


def read_yolo(tree: Path, **settings: Any) -> Any:
    folders = [str(tree / name / "train") for name in ("images", "labels")]
    return supervision_dataset("yolo", *folders, str(tree / "data.yaml"), **settings)


def test_supervision_reads_yolo(tmp_path: Path, album: Path, rows: list[dict[str, Any]]) -> None:
    flat = [rows[0], rows[2]]  # supervision reads no folders below that of the images
    write_views(write_rows(tmp_path / "rows", flat), ["yolo"], tmp_path / "out")
    dataset = read_yolo(tmp_path / "out" / "yolo")
    assert dataset.classes == ["label 0", "label 1", "label 2"]
    found = by_name(dataset, tmp_path / "out/yolo/images/train")
    assert set(found) == {"a.png", "d.png"} and len(found["d.png"]) == 0
    exact = np.array([box["xyxy"] for box in rows[0]["boxes"]])
    # half of the sixth decimal for the centre, and a quarter for the half of the size
    assert np.abs((found["a.png"].xyxy - exact) / SIZE).max() < 0.76e-6
    assert found["a.png"].class_id.tolist() == [0, 1, 2, 0, 1]


def test_supervision_reads_oriented_boxes(tmp_path: Path, album: Path) -> None:
    corners = [10.0, 20.0, 110.0, 30.0, 108.0, 50.0, 8.0, 40.0]
    row = quads("a.png", ("STOP", corners)) | {"place": str(album / "a.png")}
    write_views(write_rows(tmp_path / "rows", [row]), ["yolo-obb"], tmp_path / "out")
    dataset = read_yolo(tmp_path / "out" / "yolo-obb", is_obb=True)
    (found,) = dataset.annotations.values()
    assert found.data["xyxyxyxy"].reshape(-1) == pytest.approx(corners, abs=1e-3) and dataset.classes == ["text"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset closes no file
def test_webdataset_reads_the_tars(tmp_path: Path) -> None:
    import webdataset

    members = [(f"x/{i}.png", png("red")) for i in (3, 1, 2)]
    tar = write_tar(tmp_path / "in" / "shard-0.tar", members)
    rows = [in_tar(tar, f"x/{i}.png", caption(f"x/{i}", f"text {i}")) for i in (1, 2, 3)]
    write_views(write_rows(tmp_path / "rows", rows), ["webdataset"], tmp_path / "out", settings=WITH_IMAGES)
    ours, theirs = (
        list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
        for path in (tmp_path / "out/webdataset/shard-0.tar", tar)
    )
    assert [sample["__key__"] for sample in ours] == [sample["__key__"] for sample in theirs] == ["x/3", "x/1", "x/2"]
    for sample in ours:
        assert sample["png"].size == (200, 100) and sample["txt"] == f"text {sample['__key__'][2:]}"
        (row,) = sample["florence2.json"]
        assert row["text"] == sample["txt"] and row["task"] == "<CAPTION>"


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_datasets_reads_parquet(tmp_path: Path, rows: list[dict[str, Any]], datasets: Any) -> None:
    texts = [caption("a.png", "a cat", confidence=0.5)]
    settings = ViewSettings(split={"train": 0.5, "test": 0.5})
    write_views(write_rows(tmp_path / "rows", [*rows, *texts]), ["parquet"], tmp_path / "out", settings=settings)
    loaded = datasets.load_dataset(str(tmp_path / "out" / "parquet"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "test"}
    values = sorted(
        (row for part in loaded.values() for row in part), key=lambda row: (row["id"], row["task"] == "<CAPTION>")
    )
    columns = to_columns([rows[0], *texts, *rows[1:]])
    assert values == [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_datasets_reads_a_folder_of_images(tmp_path: Path, album: Path, datasets: Any) -> None:
    rows = [caption(name, f"text of {name}") | {"place": str(album / name)} for name in NAMES]
    write_views(write_rows(tmp_path / "rows", rows), ["metadata"], tmp_path / "out")
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out" / "metadata"), cache_dir=str(tmp_path / "cache")
    )
    values = {row["text"]: row["image"].size for row in loaded["train"]}
    assert values == {f"text of {name}": (200, 100) for name in NAMES}


def test_datasets_reads_the_tars(tmp_path: Path, album: Path, datasets: Any) -> None:
    rows = [caption(name, f"text of {name}") | {"place": str(album / name)} for name in NAMES]
    write_views(write_rows(tmp_path / "rows", rows), ["webdataset"], tmp_path / "out", settings=WITH_IMAGES)
    files = [str(path) for path in (tmp_path / "out" / "webdataset").iterdir()]
    loaded = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert [row["__key__"] for row in loaded["train"]] == ["a", "b/c", "d"]
    assert [row["txt"] for row in loaded["train"]] == [f"text of {name}" for name in NAMES]
    assert json.loads(json.dumps(loaded["train"][0]["florence2.json"]))[0]["id"] == "a.png"
