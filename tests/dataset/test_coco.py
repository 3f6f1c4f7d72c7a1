"""COCO files, read back by pycocotools."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from florence2.dataset.regions import shoelace
from florence2.dataset.views import ViewSettings
from florence2.dataset.writing import write_views
from tests.dataset.rows import boxes, caption, cascade, failed, polygons, quads, write_rows

FLOAT32 = np.array([37.459503, 21.009, 71.27251, 59.079], np.float32).tolist()
"""A box as models write it: its sides in float64 are exact."""
ROWS = [
    boxes("b.jpg", ("dog", *FLOAT32, 0.125), ("cat", 0, 0, 200, 100)),
    boxes("a.jpg"),
    boxes("c.jpg", ("dog", 33.3, 1.1, 66.6, 99.9)),
    failed("d.jpg"),
    boxes("ä/e.jpg", ("häuser", 1, 2, 3, 4), image_size=[10, 12]),
]


def read(path: Path) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_detections_are_read_back(tmp_path: Path) -> None:
    report = write_views(write_rows(tmp_path / "rows", ROWS), ["coco"], tmp_path / "out")
    coco = read(tmp_path / "out" / "coco" / "instances.json")
    assert {number: image["file_name"] for number, image in coco.imgs.items()} == {
        **{1: "a.jpg", 2: "b.jpg", 3: "c.jpg"},
        5: "ä/e.jpg",  # the failed image keeps its number for the day on which it is answered
    }
    assert [(each["id"], each["name"]) for each in coco.cats.values()] == [(1, "dog"), (2, "cat"), (3, "häuser")]
    assert (coco.imgs[5]["width"], coco.imgs[5]["height"]) == (10, 12)
    found = coco.loadAnns(coco.getAnnIds(imgIds=[2]))
    for annotation, box in zip(found, ROWS[0]["boxes"], strict=True):
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == tuple(box["xyxy"])  # exactly
        assert (annotation["score"], annotation["confidence"]) == (box["score"], box["confidence"])
        assert annotation["area"] == pytest.approx(width * height, abs=1e-4)
        assert annotation["iscrowd"] == 0 and annotation["segmentation"] == []
    assert [annotation["id"] for annotation in coco.dataset["annotations"]] == [1, 2, 3, 4]
    assert coco.getAnnIds(imgIds=[1]) == [] and report.complete
    assert report.report["coco"]["counts"] == {"annotations": 4, "images": 4}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pycocotools' masks
def test_outlines_and_texts(tmp_path: Path) -> None:
    rings = [[10.0, 10.0, 60.0, 10.0, 60.0, 50.0], [100.0, 20.0, 140.0, 20.0, 140.0, 60.0, 100.0, 60.0]]
    rows = [polygons("a", ("cup", rings)), quads("b", ("STOP", [1, 1, 50, 1, 50, 20, 1, 20])), cascade("c")]
    tasks = ["referring_expression_segmentation", "<OCR_WITH_REGION>", "cascade"]
    write_views(write_rows(tmp_path / "rows", rows), ["coco"], tmp_path / "out", tasks=tasks)
    coco = read(tmp_path / "out" / "coco" / "instances.json")
    cup, text, of_cascade, spoon = coco.dataset["annotations"]
    assert cup["segmentation"] == rings and cup["area"] == sum(map(shoelace, rings)) == 1000 + 1600
    assert cup["bbox"] == [10, 10, 130, 50]
    assert coco.annToMask(cup).sum() == pytest.approx(2600, rel=0.05)
    assert coco.cats[text["category_id"]]["name"] == "text" and text["text"] == "STOP" and text["area"] == 49 * 19
    assert of_cascade["segmentation"] == [[0, 0, 50, 0, 50, 50]] and of_cascade["bbox"] == [0, 0, 50, 50]
    assert of_cascade["area"] == 1250 and spoon["segmentation"] == [] and spoon["area"] == 900
    assert [each["name"] for each in coco.cats.values()] == ["cup", "text", "a cup", "a spoon"]


def test_classes_match_the_texts_of_quads(tmp_path: Path) -> None:
    rows = [quads("b", ("stop", [1, 1, 50, 1, 50, 20, 1, 20]), ("7", [1, 1, 50, 1, 50, 20, 1, 20]))]
    settings = ViewSettings(classes=["STOP", "GO"], unmatched="drop")
    write_views(write_rows(tmp_path / "rows", rows), ["coco"], tmp_path / "out", settings=settings)
    (annotation,) = read(tmp_path / "out" / "coco" / "instances.json").dataset["annotations"]
    assert annotation["category_id"] == 1 and annotation["text"] == "stop"


def test_results_are_scored_against_the_detections(tmp_path: Path) -> None:
    """COCOeval finds every box again: average precision 1."""
    write_views(write_rows(tmp_path / "rows", ROWS), ["coco", "coco-results"], tmp_path / "out")
    coco = read(tmp_path / "out" / "coco" / "instances.json")
    with contextlib.redirect_stdout(io.StringIO()):
        found = coco.loadRes(str(tmp_path / "out" / "coco-results" / "results.json"))
        evaluation = COCOeval(coco, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
    scores = [each["score"] for each in json.loads((tmp_path / "out/coco-results/results.json").read_bytes())]
    assert scores == [0.125, 0.5, 0.5, 0.5] and np.array(evaluation.stats).shape == (12,)


def test_results_without_scores(tmp_path: Path) -> None:
    rows = [boxes("a", ("dog", 1, 2, 3, 4)), boxes("b", ("dog", 1, 2, 3, 4))]
    del rows[0]["boxes"][0]["confidence"], rows[1]["boxes"][0]["confidence"], rows[1]["boxes"][0]["score"]
    report = write_views(write_rows(tmp_path / "rows", rows), ["coco-results"], tmp_path / "out")
    scores = [each["score"] for each in json.loads((tmp_path / "out/coco-results/results.json").read_bytes())]
    assert scores == [0.25, 1.0] and "coco-results: 1 region without a score got 1." in report.notes


def test_captions(tmp_path: Path) -> None:
    rows = [caption("a", " a cat "), caption("a", "a cat on a mat", "<DETAILED_CAPTION>"), caption("b", 'a "dog"\n')]
    settings = ViewSettings(prefix="see: ", suffix=".")
    tasks = ["caption", "detailed_caption"]
    write_views(
        write_rows(tmp_path / "rows", rows), ["coco-captions"], tmp_path / "out", tasks=tasks, settings=settings
    )
    coco = read(tmp_path / "out" / "coco-captions" / "captions.json")
    texts = [[each["caption"] for each in coco.imgToAnns[number]] for number in (1, 2)]
    assert texts == [["see: a cat.", "see: a cat on a mat."], ['see: a "dog".']]


def test_parts(tmp_path: Path) -> None:
    rows = [boxes(f"{i}.jpg", ("dog", 1, 2, 3, 4)) for i in range(20)]
    settings = ViewSettings(split={"train": 0.5, "val": 0.5})
    write_views(write_rows(tmp_path / "rows", rows), ["coco", "coco-results"], tmp_path / "out", settings=settings)
    train, val = (read(tmp_path / "out" / "coco" / f"instances_{part}.json") for part in ("train", "val"))
    assert sorted([*train.imgs, *val.imgs]) == list(range(1, 21)) and train.imgs and val.imgs
    assert train.cats == val.cats
    assert sorted([*train.anns, *val.anns]) == list(range(1, 21))
    results = json.loads((tmp_path / "out/coco-results/results_val.json").read_bytes())
    assert [each["image_id"] for each in results] == list(val.imgs)


def test_nothing_to_list(tmp_path: Path) -> None:
    """An answer without regions is an image without annotations."""
    write_views(write_rows(tmp_path / "rows", [boxes("a")]), ["coco", "coco-results"], tmp_path / "out")
    coco = read(tmp_path / "out" / "coco" / "instances.json")
    assert len(coco.imgs) == 1 and not coco.anns and not coco.cats
    assert json.loads((tmp_path / "out/coco-results/results.json").read_bytes()) == []


def test_labels_that_are_not_unicode(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "results.jsonl").write_text(json.dumps(boxes("\ud800.jpg", ("\udfff", 1, 2, 3, 4))) + "\n")
    write_views(folder, ["coco", "yolo", "csv"], tmp_path / "out")
    values = json.loads((tmp_path / "out/coco/instances.json").read_bytes())
    assert values["images"][0]["file_name"] == "\ud800.jpg" and values["categories"][0]["name"] == "\udfff"
