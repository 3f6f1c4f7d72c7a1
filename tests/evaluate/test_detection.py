"""mAP, against pycocotools run directly on files, and labels as categories."""

import contextlib
import io
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from florence2.evaluate.detection import (
    RANKINGS,
    category_of,
    describe_unknown,
    detections,
    mean_average_precision,
    ranked_boxes,
    to_coco,
    unknown_labels,
)
from florence2.evaluate.intervals import draw_counts
from florence2.evaluate.metrics.precision import mean_precisions
from florence2.evaluate.tables.catalogue import read_table
from florence2.evaluate.tables.detection import Instance, Instances


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
    return float(evaluated(truth, results, folder).stats[0])


def evaluated(truth: Path, results: list[dict[str, Any]], folder: Path) -> COCOeval:
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        evaluation = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("ranking", RANKINGS)
def test_equal_to_pycocotools_on_files(ranking: str, data: Path, tmp_path: Path) -> None:
    images = [example.truth for example in read_table("coco-detection", data)]
    answers = [answer(image, random.Random(image.image_id)) for image in images]
    results = detections(images, answers, ranking)
    expected = official(data / "coco" / "annotations" / "instances_val2017.json", results, tmp_path)
    value, interval = mean_average_precision(images, results)
    assert value == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected < 0.9
    assert interval is None  # nine images


def synthetic_images(count: int) -> list[Instances]:
    """Images with up to six objects of three categories, some of them crowds; every fifth image is empty."""
    rng, categories, ids = random.Random(7), {"dog": 1, "cat": 4, "cup": 5}, iter(range(1, 10 * count))

    def instance() -> Instance:
        left, top, width, height = (rng.uniform(5, 60) for _ in range(4))
        number = rng.choice((1, 4, 5))
        return Instance(number, (left, top, width, height), width * height, rng.random() < 0.1, None)

    return [
        Instances(i, 120, 120, {next(ids): instance() for _ in range(rng.randint(1, 6) if i % 5 else 0)}, categories)
        for i in range(count)
    ]


def repeated(images: list[Instances], answers: list[Any], counts: Any) -> tuple[list[Instances], list[Any]]:
    """Each image so many times, as images of their own."""
    numbers, ids = itertools.count(), itertools.count(1)
    pairs = [pair for pair, count in zip(zip(images, answers, strict=True), counts, strict=True) for _ in range(count)]
    copies = [
        replace(image, image_id=next(numbers), objects={next(ids): each for each in image.objects.values()})
        for image, _ in pairs
    ]
    return copies, [found for _, found in pairs]


def test_samples_are_those_of_pycocotools(tmp_path: Path) -> None:
    """Each sample has the mAP that pycocotools finds for a file in which the images are written as often."""
    images = synthetic_images(12)
    answers = [answer(image, random.Random(image.image_id)) for image in images]
    (tmp_path / "truth.json").write_text(json.dumps(to_coco(images)))
    ranked = ranked_boxes(evaluated(tmp_path / "truth.json", detections(images, answers, "model"), tmp_path))
    for counts in [np.ones(12, np.int64), *itertools.islice(draw_counts(12), 4)]:
        copies, found = repeated(images, answers, counts)
        (tmp_path / "copies.json").write_text(json.dumps(to_coco(copies)))
        expected = official(tmp_path / "copies.json", detections(copies, found, "model"), tmp_path)
        assert mean_precisions(ranked, counts[None])[0] == pytest.approx(expected, abs=1e-12)
        assert 0.1 < expected < 0.9


@pytest.mark.release
def test_the_interval_is_around_the_result() -> None:
    images = synthetic_images(40)
    answers = [answer(image, random.Random(image.image_id)) for image in images]
    value, interval = mean_average_precision(images, detections(images, answers, "model"))
    low, high = interval or (0, 0)
    assert 0.02 < value - low < 0.15 and 0.02 < high - value < 0.15
    more, found = repeated(images, answers, [20] * 40)
    narrow = mean_average_precision(more, detections(more, found, "model"))[1]
    assert narrow and 2 < (high - low) / (narrow[1] - narrow[0]) < 8  # the square root of 20 is 4.5
    assert mean_average_precision(images, []) == (0, (0, 0))
    names = ("image_id", "category_id", "bbox", "score")
    objects = [(image.image_id, each) for image in images for each in image.objects.values()]
    truths = [dict(zip(names, (id, each.category, list(each.box), 1.0), strict=True)) for id, each in objects]
    value, interval = mean_average_precision(images, truths)
    assert (value, *(interval or ())) == pytest.approx((1, 1, 1))


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


def test_sentences_about_labels() -> None:
    boxes = [{"label": label} for label in ("unicorn", "unicorn", "x" * 90, "sofa")]
    assert describe_unknown([{"boxes": boxes}], {"couch": 63}) == [
        "Labels taken for categories: sofa for couch.",
        f"3 boxes have labels that mean no category, such as unicorn (2), {'x' * 37}... (1).",
    ]
    assert describe_unknown([{"boxes": boxes[3:]}], {"couch": 63}) == ["Labels taken for categories: sofa for couch."]
    assert describe_unknown([{"boxes": boxes[:1]}], {"dog": 1}) == [
        "1 boxes have labels that mean no category, such as unicorn (1)."
    ]
    assert describe_unknown([{}], {"dog": 1}) == []


def test_nothing_found(data: Path) -> None:
    images = [example.truth for example in read_table("coco-detection", data)]
    assert mean_average_precision(images, []) == (0, None)


def test_ten_images_are_enough_for_an_interval() -> None:
    images = synthetic_images(10)
    answers = [answer(image, random.Random(1)) for image in images]
    assert mean_average_precision(images, detections(images, answers, "one"))[1] is not None
    assert mean_average_precision(images[:9], detections(images[:9], answers[:9], "one"))[1] is None
