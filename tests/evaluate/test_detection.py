"""mAP, against pycocotools run directly on files, and labels as categories."""

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from florence2.evaluate.detection import RANKINGS, category_of, detections, mean_average_precision, unknown_labels
from florence2.evaluate.tables.catalogue import read_table
from florence2.evaluate.tables.detection import Instances


def answer(image: Instances, rng: random.Random) -> dict[str, Any]:
    """Boxes that are right, nearly right or wrong, with confidences."""
    names = {number: name for name, number in image.categories.items()}
    found = []
    for each in image.objects.values():
        left, top, width, height = each.box
        shift = rng.choice((0, 0, 0.1, 0.3)) * width
        label = rng.choice((names[each.category],) * 4 + ("unicorn",))
        corners = [left + shift, top, left + shift + width, top + height]
        found.append({"xyxy": corners, "label": label, "confidence": rng.random()})
    return {"boxes": found}


def official(truth: Path, results: list[dict[str, Any]], folder: Path) -> float:
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        evaluation = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.mark.parametrize("ranking", RANKINGS)
def test_equal_to_pycocotools_on_files(ranking: str, data: Path, tmp_path: Path) -> None:
    images = [example.truth for example in read_table("coco-detection", data)]
    answers = [answer(image, random.Random(image.image_id)) for image in images]
    results = detections(images, answers, ranking)
    expected = official(data / "coco" / "annotations" / "instances_val2017.json", results, tmp_path)
    assert mean_average_precision(images, results) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected < 0.9


def test_rankings() -> None:
    image = Instances(1, 100, 100, {}, {"dog": 3})
    boxes = [{"xyxy": [0, 0, 5, 5], "label": "Dog", "confidence": 0.2, "score": 0.9}]
    boxes += [{"xyxy": [0, 0, 5, 5], "label": "dog", "score": 0.7}, {"xyxy": [0, 0, 5, 5], "label": "dog"}]
    scores = {name: [each["score"] for each in detections([image], [{"boxes": boxes}], name)] for name in RANKINGS}
    assert scores == {"model": [0.2, 0.7, 1], "one": [1, 1, 1], "order": [1, 1 / 2, 1 / 3]}


def test_labels() -> None:
    categories = {"person": 1, "couch": 63, "cell phone": 77}
    assert [category_of(label, categories) for label in ("Person", "sofa", "woman", "mobile phone", "television")] == [
        *(1, 63, 1, 77, None)
    ]
    assert unknown_labels([{"boxes": [{"label": "unicorn"}, {"label": "sofa"}]}, {}], categories) == {"unicorn": 1}


def test_nothing_found(data: Path) -> None:
    images = [example.truth for example in read_table("coco-detection", data)]
    assert mean_average_precision(images, []) == 0
