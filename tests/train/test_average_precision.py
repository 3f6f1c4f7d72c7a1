"""mAP against hand-computed cases, and against pycocotools run in its own usual way."""

import copy

import numpy as np
import pytest
from pycocotools.coco import COCO  # type: ignore[import-untyped]
from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]

from florence2.train.average_precision import Detection, average_precision

A, B = [0.0, 0.0, 100.0, 100.0], [200.0, 200.0, 50.0, 50.0]
AWAY = [400.0, 400.0, 10.0, 10.0]
Rows = list[list[Detection]]


def test_perfect() -> None:
    truths = [[Detection("cat", A), Detection("dog", B)], [Detection("cat", B)], []]
    assert average_precision(truths, truths) == pytest.approx((1, 1))


def test_nothing_found_and_nothing_to_find() -> None:
    truths = [[Detection("cat", A)]]
    assert average_precision(truths, [[]]) == (0.0, 0.0)
    assert average_precision([[]], truths) is None


def test_scores_rank_the_boxes() -> None:
    """Two truths, two right boxes, a wrong one: precision is 1 up to recall 0.5 (51 of 101 points), then 2/3."""
    truths = [[Detection("cat", A)], [Detection("cat", A)]]
    between = [[Detection("cat", A, 0.9), Detection("cat", AWAY, 0.8)], [Detection("cat", A, 0.7)]]
    assert average_precision(truths, between) == pytest.approx(((51 + 50 * 2 / 3) / 101,) * 2)
    last = [[Detection("cat", A, 0.9), Detection("cat", AWAY, 0.6)], [Detection("cat", A, 0.7)]]
    assert average_precision(truths, last) == pytest.approx((1, 1))


def test_thresholds() -> None:
    """An IoU of 0.72 is enough for 0.5, 0.55, 0.6, 0.65 and 0.7."""
    found = average_precision([[Detection("cat", A)]], [[Detection("cat", [0.0, 0.0, 100.0, 72.0])]])
    assert found == pytest.approx((1.0, 0.5))


def test_the_mean_is_over_the_labels_of_the_truths() -> None:
    truths = [[Detection("cat", A), Detection("dog", B)]]
    found = [[Detection("cat", A), Detection("cow", B), Detection("cow", A)]]
    assert average_precision(truths, found) == pytest.approx((0.5, 0.5))


def test_a_box_counts_in_its_own_image_only() -> None:
    assert average_precision([[Detection("cat", A)], []], [[], [Detection("cat", A)]]) == (0.0, 0.0)


def random_rows(seed: int) -> tuple[Rows, Rows]:
    """Make truths, and jittered copies of most of them with strays, over 12 images and 3 labels."""
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for _ in range(12):
        boxes = [[*rng.uniform(0, 300, 2), *rng.uniform(10, 200, 2)] for _ in range(rng.integers(0, 7))]
        labels = rng.choice(["cat", "dog", "cow"], len(boxes))
        truths.append([Detection(str(label), box) for label, box in zip(labels, boxes, strict=True)])
        shaken = [(label, [v + rng.normal(0, 4) for v in box]) for label, box in zip(labels, boxes, strict=True)]
        strays = [(rng.choice(["cat", "dog"]), [*rng.uniform(0, 300, 2), 40.0, 40.0]) for _ in range(3)]
        kept = [row for row in shaken if rng.random() < 0.8] + strays
        found.append([Detection(str(label), box, float(rng.random())) for label, box in kept])
    return truths, found


def usual_way(truths: Rows, found: Rows) -> tuple[float, float]:
    """As in pycocotools' own demonstration: an annotation file, a results file, evaluate, accumulate, summarize."""
    labels = ["cat", "cow", "dog"]
    rows = [(i, d) for i, row in enumerate(truths) for d in row]
    annotations = [
        {"id": n, "image_id": i, "category_id": labels.index(d.label), "bbox": d.area, "iscrowd": 0}
        | {"area": d.area[2] * d.area[3]}
        for n, (i, d) in enumerate(rows, 1)
    ]
    truth = COCO()
    truth.dataset = {"info": {}, "annotations": copy.deepcopy(annotations)}
    truth.dataset |= {"images": [{"id": i} for i in range(len(truths))], "categories": [{"id": i} for i in range(3)]}
    truth.createIndex()
    results = [
        {"image_id": i, "category_id": labels.index(d.label), "bbox": d.area, "score": d.score}
        for i, row in enumerate(found)
        for d in row
    ]
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[1], evaluation.stats[0]


@pytest.mark.parametrize("seed", range(3))
def test_against_pycocotools(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    truths, found = random_rows(seed)
    ours = average_precision(truths, found)
    assert capsys.readouterr().out == ""
    expected = usual_way(truths, found)
    assert ours == pytest.approx(expected, abs=1e-12)
    assert 0.1 < ours[1] < ours[0] < 0.9  # neither trivial
