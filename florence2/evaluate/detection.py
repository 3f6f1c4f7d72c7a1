"""Mean average precision on COCO: labels to categories, three rankings of the boxes, pycocotools."""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from florence2.errors import clip
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


def mean_average_precision(instances: Sequence[Instances], results: Sequence[Mapping[str, Any]]) -> float:
    """Return COCO's mAP, 0 to 1: the mean over categories and IoUs of 0.5 to 0.95, with 100 boxes an image.

    Args:
        instances: The images that were asked about, with their objects.
        results: The boxes found (see `detections`).
    """
    if not results:  # an empty list is an error to pycocotools
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step
        truth = COCO()
        truth.dataset = _to_coco(instances)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(list(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return max(float(evaluation.stats[0]), 0.0)  # -1 stands for images without any object


def _to_coco(instances: Sequence[Instances]) -> dict[str, Any]:
    return {
        "info": {},
        "images": [{"id": each.image_id, "width": each.width, "height": each.height} for each in instances],
        "categories": [{"id": number, "name": name} for name, number in instances[0].categories.items()],
        "annotations": [
            {
                "id": number,
                "image_id": each.image_id,
                "category_id": instance.category,
                "bbox": list(instance.box),
                "area": instance.area,
                "iscrowd": int(instance.is_crowd),
            }
            for each in instances
            for number, instance in each.objects.items()
        ],
    }
