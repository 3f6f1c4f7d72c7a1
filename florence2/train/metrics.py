"""How good answers are: pairs of the answer wanted and the answer given -> numbers from 0 to 1, higher is better.

Both answers come from the same parser, so what it cannot read in a truth no model is asked for.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein

from florence2.answers.answer import Answer
from florence2.inputs.tasks import TASKS, AnswerKind
from florence2.train.average_precision import Detection, average_precision
from florence2.train.overlap import Shape, box_shape, match, outline_shape, overlaps

Pair: TypeAlias = tuple[Answer, Answer]
"""The answer wanted, the answer given."""
Metrics: TypeAlias = dict[str, float]
Labelled: TypeAlias = tuple[str, Shape]

LEAST_IOU = 0.5
"""From where on two regions are the same one."""
FREE_PROMPTS = "free prompts"


def measure_by_task(pairs: Sequence[Pair]) -> dict[str, Metrics]:
    """Pairs of any tasks -> the metrics of each task by its token, those of prompts without one as FREE_PROMPTS.

    Beside `count`, the number of pairs, a task has the metrics of its kind of answer: see `measure_text`,
    `measure_boxes`, `measure_quads` and `measure_polygons`; an open vocabulary's those of what its truths hold,
    or its answers where there is nothing.
    """
    groups: dict[str, list[Pair]] = {token: [] for token in (*TASKS, FREE_PROMPTS)}
    for truth, answer in pairs:
        groups[truth.task if truth.task in TASKS else FREE_PROMPTS].append((truth, answer))
    return {token: _measure(group) for token, group in groups.items() if group}


def measure_text(pairs: Sequence[Pair]) -> Metrics:
    """`exact_match`: the share of answers that are right to the letter, but for white space around them.

    `edit_similarity`: 1 - edits / length of the longer text, the mean of all answers (Levenshtein: a letter more,
    less or other is one edit). `word_accuracy`: the share of all words wanted that were given in the same order.
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
    """`map_50` and `map_50_95`: mean average precision over the truths' labels, boxes ranked by their scores.

    They are absent without any truth. `precision`, `recall` and `f1` of all boxes: right is one that overlaps a truth
    of the same label, not yet found, by LEAST_IOU or more.
    """
    mean = average_precision([_detections(truth) for truth, _ in pairs], [_detections(answer) for _, answer in pairs])
    metrics = {} if mean is None else {"map_50": mean[0], "map_50_95": mean[1]}
    return metrics | _count_found(pairs, _boxes)


def measure_quads(pairs: Sequence[Pair]) -> Metrics:
    """`precision`, `recall` and `f1` of lines of text: right is the same text in a quad that overlaps by LEAST_IOU."""
    return _count_found(pairs, _quads)


def measure_polygons(pairs: Sequence[Pair]) -> Metrics:
    """`miou`: the mean IoU of masks, 0 for one without counterpart.

    An answer's outlines are one mask together; in an open vocabulary there is one for each label.
    """
    ious = [iou for truth, answer in pairs for iou in _mask_ious(_masks(truth), _masks(answer))]
    return {"miou": _share(sum(ious), len(ious))}


def format_metrics(metrics: Mapping[str, Metrics]) -> str:
    """One line per task: its token, how many answers, and its metrics."""
    width = max(map(len, metrics), default=0)
    rows = []
    for task, values in metrics.items():
        named = [f"{name} {value:.3f}" for name, value in values.items() if name != "count"]
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
    """The metrics of one task."""
    parts: dict[AnswerKind, list[Pair]] = defaultdict(list)
    for truth, answer in pairs:
        kind = truth.kind
        if kind == "boxes_or_polygons":
            shown = truth if truth.boxes or truth.polygons else answer  # of nothing, the answer's kind
            kind = "polygons" if shown.polygons else "boxes"
        parts[kind].append((truth, answer))
    metrics: Metrics = {"count": len(pairs)}
    for kind, part in parts.items():
        metrics |= _MEASURES[kind](part)
    return metrics


def _detections(answer: Answer) -> list[Detection]:
    return [
        Detection(box.label, box_shape(box, answer.image_size), 1.0 if box.score is None else box.score)
        for box in answer.boxes
    ]


def _boxes(answer: Answer) -> list[Labelled]:
    return [(box.label, box_shape(box, answer.image_size)) for box in answer.boxes]


def _quads(answer: Answer) -> list[Labelled]:
    return [(quad.label, outline_shape([quad.xyxyxyxy], answer.image_size)) for quad in answer.quads]


def _count_found(pairs: Sequence[Pair], regions_of: Callable[[Answer], list[Labelled]]) -> Metrics:
    right = wanted = given = 0
    for truth, answer in pairs:
        truths, found = regions_of(truth), regions_of(answer)
        right += len(match(_labelled_overlaps(truths, found), LEAST_IOU))
        wanted, given = wanted + len(truths), given + len(found)
    return {
        "precision": _share(right, given),
        "recall": _share(right, wanted),
        "f1": _share(2 * right, wanted + given),
    }


def _labelled_overlaps(truths: Sequence[Labelled], found: Sequence[Labelled]) -> np.ndarray:
    """IoUs (T, F), 0 where the labels differ."""
    same = [[label == other for other, _ in found] for label, _ in truths]
    ious = overlaps([shape for _, shape in truths], [shape for _, shape in found])
    return np.where(np.array(same, bool).reshape(ious.shape), ious, 0.0)


def _masks(answer: Answer) -> dict[str, Shape]:
    """One mask for each label; where the question names the thing, the parser reads none, and there is one in all."""
    rings: dict[str, list[Sequence[float]]] = defaultdict(list)
    for polygon in answer.polygons:
        rings[polygon.label] += polygon.rings
    return {label: outline_shape(rows, answer.image_size) for label, rows in rings.items()}


def _mask_ious(truths: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[float]:
    return [
        float(overlaps([truths[label]], [found[label]])[0, 0]) if label in truths and label in found else 0.0
        for label in sorted(truths.keys() | found.keys())
    ]


def _share(part: float, whole: int) -> float:
    """`part` of `whole`; all of it where there is nothing: nothing is wrong then."""
    return part / whole if whole else 1.0
