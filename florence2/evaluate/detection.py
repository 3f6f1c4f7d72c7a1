"""Mean average precision on COCO: labels to categories, three rankings of the boxes, pycocotools."""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from florence2.errors import clip
from florence2.evaluate.intervals import LEAST_IMAGES, draw_counts, middle
from florence2.evaluate.metrics.precision import RankedBoxes, mean_precisions
from florence2.evaluate.tables.detection import Instances

SYNONYMS = {
    **{"television": "tv", "sofa": "couch", "table": "dining table", "houseplant": "potted plant"},
    **{
        "plant": "potted plant",
        "mobile phone": "cell phone",
        "doughnut": "donut",
        "hair dryer": "hair drier",
        "plane": "airplane",
    },
    **{"motorbike": "motorcycle", "bike": "bicycle", "mug": "cup", "ski": "skis", "computer mouse": "mouse"},
    **dict.fromkeys(("man", "woman", "boy", "girl", "child", "human", "people", "pedestrian"), "person"),
    **{"ball": "sports ball", "stove": "oven", "remote control": "remote", "computer keyboard": "keyboard"},
}
"""Labels that are not names of COCO's categories, and the category that each means."""
_SHOWN_LABELS = 20
_MOST_CELLS = 1 << 21  # boxes times samples that are counted at once


def _model_score(box: Mapping[str, Any], _: int) -> float:
    return float(next((box[name] for name in ("confidence", "score") if box.get(name) is not None), 1.0))


RANKINGS: dict[str, Callable[[Mapping[str, Any], int], float]] = {
    "model": _model_score,
    "one": lambda _box, _place: 1.0,
    "order": lambda _box, place: 1 / (1 + place),
}
"""How boxes are ranked: by the model's confidence, all alike, or in the order of the answer. The paper does not say."""


def category_of(label: str, categories: Mapping[str, int]) -> int | None:
    """Return the category that a label means, by name or synonym; None for a label that means none."""
    name = label.casefold().strip()
    return categories.get(name, categories.get(SYNONYMS.get(name, "")))


def detections(
    instances: Sequence[Instances], answers: Sequence[Mapping[str, Any]], ranking: str
) -> list[dict[str, Any]]:
    """Return the boxes of the answers in COCO's form for results; boxes whose labels mean no category are left out."""
    found = []
    for image, answer in zip(instances, answers, strict=True):
        for place, box in enumerate(answer.get("boxes", ())):
            category = category_of(box["label"], image.categories)
            if category is not None:
                left, top, right, bottom = box["xyxy"]
                found.append(
                    {
                        "image_id": image.image_id,
                        "category_id": category,
                        "bbox": [left, top, right - left, bottom - top],
                        "score": RANKINGS[ranking](box, place),
                    }
                )
    return found


def unknown_labels(answers: Sequence[Mapping[str, Any]], categories: Mapping[str, int]) -> Counter[str]:
    """Return how often the answers have each label that means no category."""
    labels = (str(box["label"]) for answer in answers for box in answer.get("boxes", ()))
    return Counter(label for label in labels if category_of(label, categories) is None)


def describe_unknown(answers: Sequence[Mapping[str, Any]], categories: Mapping[str, int]) -> list[str]:
    """Return sentences about the labels that mean no category, and about the synonyms."""
    unknown = unknown_labels(answers, categories)
    used = {label: name for label, name in SYNONYMS.items() if name in categories}
    sentences = [f"Labels taken for categories: {'; '.join(f'{label} for {name}' for label, name in used.items())}."]
    if unknown:
        named = ", ".join(f"{clip(label, 40)} ({count})" for label, count in unknown.most_common(_SHOWN_LABELS))
        sentences.append(f"{unknown.total():,} boxes have labels that mean no category, such as {named}.")
    return sentences if used else sentences[1:]


def mean_average_precision(
    instances: Sequence[Instances], results: Sequence[Mapping[str, Any]]
) -> tuple[float, tuple[float, float] | None]:
    """Return COCO's mAP, 0 to 1, and its interval of 95 %.

    It is the mean over categories and IoUs of 0.5 to 0.95, with 100 boxes an image. The interval is a bootstrap over
    images: how each of their boxes counts stays, and which images there are changes.

    Args:
        instances: The images that were asked about, with their objects.
        results: The boxes found (see `detections`).

    Returns:
        The mAP, and the interval; None for fewer than `LEAST_IMAGES` images.
    """
    enough = len(instances) >= LEAST_IMAGES
    if not results:  # an empty list is an error to pycocotools
        return 0.0, (0.0, 0.0) if enough else None
    evaluation = _evaluate(instances, results)
    value = max(float(evaluation.stats[0]), 0.0)  # -1 stands for images without any object
    if not enough:
        return value, None
    means = np.asarray(_sample(ranked_boxes(evaluation), len(instances)))
    # images that are drawn twice lift the best precision, so the samples are moved to where the result is
    low, high = middle(means - means.mean() + value)
    return value, (max(low, 0.0), min(high, 1.0))


def _evaluate(instances: Sequence[Instances], results: Sequence[Mapping[str, Any]]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step
        truth = COCO()
        truth.dataset = to_coco(instances)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(list(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _sample(categories: Sequence[RankedBoxes], images: int) -> list[float]:
    """Return the mAP of samples of the images."""
    most = max(len(each.images) for each in categories)
    size = max(1, _MOST_CELLS // max(most, images))
    drawn, means = draw_counts(images), []
    while counts := list(islice(drawn, size)):
        means += mean_precisions(categories, np.stack(counts)).tolist()
    return means


def ranked_boxes(evaluation: COCOeval) -> list[RankedBoxes]:
    """Return how pycocotools counted the boxes of each category, the images in its order."""
    images = len(evaluation.params.imgIds)
    areas = len(evaluation.params.areaRng)  # the first one is all of them
    cells = evaluation.evalImgs
    return [_rank(cells[start : start + images]) for start in range(0, len(cells), areas * images)]


def _rank(cells: Sequence[Mapping[str, Any] | None]) -> RankedBoxes:
    """Join what pycocotools found in each image; None stands for an image without boxes and objects."""
    truths = [0 if cell is None else int((~np.asarray(cell["gtIgnore"], bool)).sum()) for cell in cells]
    found = [(number, cell) for number, cell in enumerate(cells) if cell is not None]
    if not found:
        nothing = np.zeros((0, 0), bool)
        return RankedBoxes(np.zeros(0, np.int64), nothing, nothing, np.asarray(truths))
    order = np.argsort([-score for _, cell in found for score in cell["dtScores"]], kind="stable")
    images = np.asarray([number for number, cell in found for _ in cell["dtScores"]], np.int64)[order]
    matched = np.concatenate([cell["dtMatches"] for _, cell in found], 1)[:, order] != 0  # (T, N)
    counted = ~np.concatenate([cell["dtIgnore"] for _, cell in found], 1)[:, order].astype(bool)
    return RankedBoxes(images, matched & counted, ~matched & counted, np.asarray(truths))


def to_coco(instances: Sequence[Instances]) -> dict[str, Any]:
    """Return the images and their objects in COCO's form."""
    numbers = count(1)  # pycocotools takes a box that matches the object 0 for one that matches none
    return {
        "info": {},
        "images": [{"id": each.image_id, "width": each.width, "height": each.height} for each in instances],
        "categories": [{"id": number, "name": name} for name, number in instances[0].categories.items()],
        "annotations": [
            {
                "id": next(numbers),
                "image_id": each.image_id,
                "category_id": instance.category,
                "bbox": list(instance.box),
                "area": instance.area,
                "iscrowd": int(instance.is_crowd),
            }
            for each in instances
            for instance in each.objects.values()
        ],
    }
