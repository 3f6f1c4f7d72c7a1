"""Mean average precision (mAP) of scored boxes, as COCO defines and pycocotools computes it."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from florence2.train.overlap import BoxArea

MOST_BOXES = 100
"""Only this many boxes of one label in one image count: those with the highest scores."""


class Detection(NamedTuple):
    """A labelled box: left, top, width, height in pixels, and the model's score (unused for a truth)."""

    label: str
    area: BoxArea
    score: float = 1.0


def average_precision(
    truths: Sequence[Sequence[Detection]], detections: Sequence[Sequence[Detection]]
) -> tuple[float, float] | None:
    """Compute mAP at IoU 0.5, and its mean over IoUs of 0.5, 0.55 ... 0.95, as fractions.

    Args:
        truths: The boxes wanted, one row for each image.
        detections: The boxes found, one row for each image.

    Returns:
        Both means over the labels of the truths; boxes with other labels do not count. None without any truth.
    """
    labels = sorted({detection.label for row in truths for detection in row})
    if not labels:
        return None
    categories = {label: i for i, label in enumerate(labels, 1)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step
        evaluation = COCOeval(_to_coco(truths, categories), _to_coco(detections, categories), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, float("inf")]], ["all"]
        evaluation.params.maxDets = [MOST_BOXES]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (IoU thresholds, 101 recalls, labels, 1, 1)
    return float(precision[0].mean()), float(precision.mean())


def _to_coco(rows: Sequence[Sequence[Detection]], categories: dict[str, int]) -> Any:
    """Convert the rows to a data set of pycocotools. Ids begin at 1, because it takes 0 for "none"."""
    kept = [(image, d) for image, row in enumerate(rows, 1) for d in row if d.label in categories]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(1, len(rows) + 1)],
        "categories": [{"id": i, "name": label} for label, i in categories.items()],
        "annotations": [
            _to_annotation(i, image, categories[detection.label], detection)
            for i, (image, detection) in enumerate(kept, 1)
        ],
    }
    coco.createIndex()
    return coco


def _to_annotation(annotation: int, image: int, category: int, detection: Detection) -> dict[str, Any]:
    _, _, width, height = detection.area
    return {
        "id": annotation,
        "image_id": image,
        "category_id": category,
        "bbox": detection.area,
        "area": width * height,
        "iscrowd": 0,
        "score": detection.score,
    }
