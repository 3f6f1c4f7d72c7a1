"""Mean average precision (mAP) of scored boxes, as COCO defines and pycocotools computes it."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from florence2.train.overlap import BoxShape

MOST_BOXES = 100
"""Of the boxes of one label found in one picture, those with the highest scores count."""


class Detection(NamedTuple):
    """A labelled box: left, top, width, height in pixels, and how sure the model is of it (a truth's score is idle)."""

    label: str
    shape: BoxShape
    score: float = 1.0


def average_precision(
    truths: Sequence[Sequence[Detection]], found: Sequence[Sequence[Detection]]
) -> tuple[float, float] | None:
    """What is there and what was found, one row per picture -> mAP at IoU 0.5, and its mean over 0.5, 0.55 ... 0.95.

    The mean is over the labels that the truths hold; boxes with other labels do not count. None without any truth.
    """
    labels = sorted({detection.label for row in truths for detection in row})
    if not labels:
        return None
    categories = {label: number for number, label in enumerate(labels, 1)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells of every step
        evaluation = COCOeval(_to_coco(truths, categories), _to_coco(found, categories), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, float("inf")]], ["all"]
        evaluation.params.maxDets = [MOST_BOXES]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (IoU thresholds, 101 recalls, labels, 1, 1)
    return float(precision[0].mean()), float(precision.mean())


def _to_coco(rows: Sequence[Sequence[Detection]], categories: dict[str, int]) -> Any:
    """The rows as a data set of pycocotools, in which ids begin at 1: it takes 0 for "none"."""
    kept = [(image, d) for image, row in enumerate(rows, 1) for d in row if d.label in categories]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(1, len(rows) + 1)],
        "categories": [{"id": number, "name": label} for label, number in categories.items()],
        "annotations": [
            _to_annotation(number, image, categories[detection.label], detection)
            for number, (image, detection) in enumerate(kept, 1)
        ],
    }
    coco.createIndex()
    return coco


def _to_annotation(number: int, image: int, category: int, detection: Detection) -> dict[str, Any]:
    _, _, width, height = detection.shape
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": detection.shape,
        "area": width * height,
        "iscrowd": 0,
        "score": detection.score,
    }
