"""Measure answers against the answers wanted: numbers from 0 to 1, higher is better.

Both come from the same parser, so no model is expected to give what the parser cannot read in a truth.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein

from florence2.answers.answer import Answer
from florence2.inputs.tasks import TASKS, AnswerKind, Task
from florence2.train.average_precision import Detection, average_precision
from florence2.train.overlap import Area, box_area, match, outline_area, overlaps

Pair: TypeAlias = tuple[Answer, Answer]
"""The answer wanted (the truth), and the answer given."""
Metrics: TypeAlias = dict[str, float]
Labelled: TypeAlias = tuple[str, Area]

LEAST_IOU = 0.5
"""Two regions count as the same one from this IoU."""
FREE_PROMPTS = "free prompts"
_COUNTS = ("count", "cut_off")


def measure_by_task(pairs: Sequence[Pair], tasks: Mapping[str, Task] = TASKS) -> dict[str, Metrics]:
    """Measure pairs of any of the `tasks` of a model.

    Returns:
        The metrics of each task by its token; those of prompts without a token are under FREE_PROMPTS. A task has
        `count`, the number of pairs, `cut_off`, how many of the answers given the token limit ended, and the metrics of
        its kind of answer: see `measure_text`, `measure_boxes`,
        `measure_quads` and `measure_polygons`. Open-vocabulary detection has those of boxes or polygons, whichever its
        truths hold, or its answers where a truth is empty.
    """
    groups: dict[str, list[Pair]] = {token: [] for token in (*tasks, FREE_PROMPTS)}
    for truth, answer in pairs:
        groups[truth.task if truth.task in tasks else FREE_PROMPTS].append((truth, answer))
    return {token: _measure(group) for token, group in groups.items() if group}


def measure_text(pairs: Sequence[Pair]) -> Metrics:
    """Measure texts, without white space around them.

    Returns:
        `exact_match`, the share of answers that are exactly right; `edit_similarity`, the mean of 1 - edits / length
        of the longer text (Levenshtein: one letter inserted, deleted or replaced is one edit); `word_accuracy`, the
        share of the wanted words that were given in the same order.
    """
    texts = [(truth.text.strip(), answer.text.strip()) for truth, answer in pairs]
    words = [(truth.split(), answer.split()) for truth, answer in texts]
    right = sum(LCSseq.similarity(truth, answer) for truth, answer in words)
    return {
        "exact_match": _share(sum(truth == answer for truth, answer in texts), len(texts)),
        "edit_similarity": _share(sum(Levenshtein.normalized_similarity(*text) for text in texts), len(texts)),
        "word_accuracy": _share(right, sum(len(truth) for truth, _ in words)),
    }


def measure_boxes(pairs: Sequence[Pair]) -> Metrics:
    """Measure boxes.

    Returns:
        `map_50` and `map_50_95`, the mean average precision over the truths' labels, with boxes ranked by their
        confidences, or scores where they have none (absent without any truth); `precision`, `recall` and `f1` of all
        boxes. A box is right when it overlaps an unmatched truth of the same label by LEAST_IOU or more.
    """
    mean = average_precision([_detections(truth) for truth, _ in pairs], [_detections(answer) for _, answer in pairs])
    metrics = {} if mean is None else {"map_50": mean[0], "map_50_95": mean[1]}
    return metrics | _count_matches(pairs, _boxes)


def measure_quads(pairs: Sequence[Pair]) -> Metrics:
    """Measure lines of text: `precision`, `recall`, `f1`. Right is the same text with an IoU of LEAST_IOU or more."""
    return _count_matches(pairs, _quads)


def measure_polygons(pairs: Sequence[Pair]) -> Metrics:
    """Measure masks: `miou`, the mean IoU, 0 for a mask without a counterpart.

    All outlines of an answer form one mask; with open-vocabulary detection, one for each label.
    """
    ious = [iou for truth, answer in pairs for iou in _mask_ious(_masks(truth), _masks(answer))]
    return {"miou": _share(sum(ious), len(ious))}


def format_metrics(metrics: Mapping[str, Metrics]) -> str:
    """Format one line for each task: its token, the number of answers, its metrics, and how many were cut off."""
    width = max(map(len, metrics), default=0)
    rows = []
    for task, values in metrics.items():
        named = [f"{name} {value:.3f}" for name, value in values.items() if name not in _COUNTS]
        named += [f"{values['cut_off']} cut off"] if values.get("cut_off") else []
        rows.append("  ".join([f"{task:<{width}}", f"{values['count']:>6}", *named]))
    return "\n".join(rows)


_MEASURES: dict[AnswerKind, Callable[[Sequence[Pair]], Metrics]] = {
    "text": measure_text,
    "boxes": measure_boxes,
    "phrases": measure_boxes,
    "proposals": measure_boxes,
    "quads": measure_quads,
    "polygons": measure_polygons,
}


def _measure(pairs: Sequence[Pair]) -> Metrics:
    """Measure the pairs of one task."""
    parts: dict[AnswerKind, list[Pair]] = defaultdict(list)
    for truth, answer in pairs:
        kind = truth.kind
        if kind == "boxes_or_polygons":
            deciding = truth if truth.boxes or truth.polygons else answer  # an empty truth has no kind
            kind = "polygons" if deciding.polygons else "boxes"
        parts[kind].append((truth, answer))
    metrics: Metrics = {"count": len(pairs), "cut_off": sum(answer.is_cut_off for _, answer in pairs)}
    for kind, part in parts.items():
        metrics |= _MEASURES[kind](part)
    return metrics


def right_regions(truth: Answer, answer: Answer) -> list[bool]:
    """Return whether each region of an answer is right: its boxes, then its quads, then its polygons.

    A region is right when it overlaps an unmatched truth of the same label by LEAST_IOU or more.
    """
    rights = []
    for regions_of in (_boxes, _quads, _outlines):
        truths, answers = regions_of(truth), regions_of(answer)
        found = {given for _, given in match(_labelled_overlaps(truths, answers), LEAST_IOU)}
        rights += [given in found for given in range(len(answers))]
    return rights


def _detections(answer: Answer) -> list[Detection]:
    return [
        Detection(box.label, box_area(box, answer.image_size), next((n for n in ranks if n is not None), 1.0))
        for box in answer.boxes
        for ranks in [(box.confidence, box.score)]
    ]


def _boxes(answer: Answer) -> list[Labelled]:
    return [(box.label, box_area(box, answer.image_size)) for box in answer.boxes]


def _quads(answer: Answer) -> list[Labelled]:
    return [(quad.label, outline_area([quad.xyxyxyxy], answer.image_size)) for quad in answer.quads]


def _outlines(answer: Answer) -> list[Labelled]:
    return [(polygon.label, outline_area(polygon.rings, answer.image_size)) for polygon in answer.polygons]


def _count_matches(pairs: Sequence[Pair], regions_of: Callable[[Answer], list[Labelled]]) -> Metrics:
    right = wanted = given = 0
    for truth, answer in pairs:
        truths, answers = regions_of(truth), regions_of(answer)
        right += len(match(_labelled_overlaps(truths, answers), LEAST_IOU))
        wanted, given = wanted + len(truths), given + len(answers)
    return {
        "precision": _share(right, given),
        "recall": _share(right, wanted),
        "f1": _share(2 * right, wanted + given),
    }


def _labelled_overlaps(truths: Sequence[Labelled], answers: Sequence[Labelled]) -> np.ndarray:
    """Return the IoUs (T, A), 0 where the labels differ."""
    same = [[label == other for other, _ in answers] for label, _ in truths]
    ious = overlaps([area for _, area in truths], [area for _, area in answers])
    return np.where(np.array(same, bool).reshape(ious.shape), ious, 0.0)


def _masks(answer: Answer) -> dict[str, Area]:
    """Return one mask for each label; where the question names the thing, all outlines have the same empty label."""
    rings: dict[str, list[Sequence[float]]] = defaultdict(list)
    for polygon in answer.polygons:
        rings[polygon.label] += polygon.rings
    return {label: outline_area(rows, answer.image_size) for label, rows in rings.items()}


def _mask_ious(truths: Mapping[str, Area], answers: Mapping[str, Area]) -> list[float]:
    return [
        float(overlaps([truths[label]], [answers[label]])[0, 0]) if label in truths and label in answers else 0.0
        for label in sorted(truths.keys() | answers.keys())
    ]


def _share(part: float, whole: int) -> float:
    """Return `part` / `whole`, or 1 where `whole` is 0: an empty answer to an empty truth is right."""
    return part / whole if whole else 1.0
