"""Scores: the results of a table from its examples and the answers to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from florence2.evaluate.intervals import bootstrap
from florence2.evaluate.metrics.boxes import Corners, enclosing_box, is_right
from florence2.evaluate.metrics.cider import cider_d
from florence2.evaluate.metrics.masks import Mask, cumulative_iou, fill_rings, mean_iou, overlap, read_counts
from florence2.evaluate.metrics.penn import split_captions
from florence2.evaluate.metrics.vqa import vqa_accuracy
from florence2.evaluate.phrases import boxes_of_phrases
from florence2.evaluate.tables.catalogue import Family
from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.evaluate.tables.expressions import Referent

StoredAnswer: TypeAlias = Mapping[str, Any]
"""The answered row of a question; an empty one stands for a question without an answer, which counts as wrong."""


@dataclass(frozen=True)
class AnsweredExample:
    """An example with the answers to its questions, in the order of the protocol."""

    example: BenchmarkExample[Any]
    answers: Sequence[StoredAnswer]


@dataclass(frozen=True)
class Score:
    """One result.

    Attributes:
        metric: Its name, such as "CIDEr".
        value: The result: percent, or CIDEr times 100.
        interval: The values between which it lies with a probability of 95 %, where images are a sample of many.
        about: The examples that it is about.
        variant: The choice that the result stands for, where one protocol gives several results.
        count: How many things were counted: the examples, or the phrases in them.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None
    about: Sequence[AnsweredExample]
    count: int
    variant: str = ""


def score_table(
    family: Family, answered: Sequence[AnsweredExample], every: Sequence[BenchmarkExample[Any]] | None = None
) -> list[Score]:
    """Return the results of a table; the first one is that which was published.

    Args:
        family: The table's family.
        answered: The examples that were asked about, at least one.
        every: All examples of the split, where only some were asked about.
    """
    return _SCORING[family](answered, every)


def _mean(metric: str, shares: Sequence[float], answered: Sequence[AnsweredExample], variant: str = "") -> Score:
    """Return the mean of the shares of all examples, in percent; an example has one share, or one for each phrase."""
    images = [each.example.image for each in answered]
    about = list({id(each): each for each in answered}.values())
    return _percent(metric, sum(shares) / len(shares), bootstrap(shares, images), about, variant, len(shares))


def _percent(
    metric: str,
    value: float,
    interval: tuple[float, float] | None,
    about: Sequence[AnsweredExample],
    variant: str = "",
    count: int | None = None,
) -> Score:
    in_percent = interval and (100 * interval[0], 100 * interval[1])
    return Score(metric, 100 * value, in_percent, about, len(about) if count is None else count, variant)


# ---- captions ------------------------------------------------------------------------------------------------------


def _score_captions(answered: Sequence[AnsweredExample], every: Sequence[BenchmarkExample[Any]] | None) -> list[Score]:
    captions = split_captions([str(each.answers[0].get("text", "")) for each in answered])
    examples = [each.example for each in answered]
    references = _split_references(examples)
    scores = cider_d(captions, references, None if every is None else _split_references(every))
    results = [_mean("CIDEr", scores, answered)]
    domains = sorted({each.truth.domain for each in examples} - {None})
    for domain in domains:
        places = [i for i, each in enumerate(examples) if each.truth.domain == domain]
        results.append(_mean("CIDEr", [scores[i] for i in places], [answered[i] for i in places], domain))
    return results


def _split_references(examples: Sequence[BenchmarkExample[Any]]) -> list[list[list[str]]]:
    """Return the words of all references, which are read one after the other as the official code does."""
    words = iter(split_captions([text for example in examples for text in example.truth.references]))
    return [[next(words) for _ in example.truth.references] for example in examples]


# ---- boxes ---------------------------------------------------------------------------------------------------------


def boxes_of(answer: StoredAnswer) -> list[Corners]:
    """Return the boxes of an answer, in its order."""
    return [box["xyxy"] for box in answer.get("boxes", ())]


def _score_expressions(answered: Sequence[AnsweredExample], _: Any) -> list[Score]:
    """Take the first box of the first answer that has one."""
    shares = []
    for each in answered:
        boxes = next(filter(None, map(boxes_of, each.answers)), [])
        shares.append(float(is_right(boxes, [each.example.truth.corners])))
    return [_mean("accuracy", shares, answered)]


def _score_phrases(answered: Sequence[AnsweredExample], _: Any) -> list[Score]:
    shares: dict[str, list[float]] = {"any-box": [], "merged": []}
    examples: list[AnsweredExample] = []
    for each in answered:
        phrases = each.example.truth.phrases
        for boxes, phrase in zip(boxes_of_phrases(each.answers[0], [p.words for p in phrases]), phrases, strict=True):
            shares["any-box"].append(float(is_right(boxes, phrase.boxes)))
            shares["merged"].append(float(is_right(boxes, [enclosing_box(phrase.boxes)])))
            examples.append(each)
    return [_mean("R@1", rights, examples, variant) for variant, rights in shares.items()]


def _score_detection(answered: Sequence[AnsweredExample], _: Any) -> list[Score]:
    from florence2.evaluate.detection import RANKINGS, detections, mean_average_precision  # which needs pycocotools

    images, answers = [each.example.truth for each in answered], [each.answers[0] for each in answered]
    results = {name: mean_average_precision(images, detections(images, answers, name)) for name in RANKINGS}
    return [_percent("mAP", *result, answered, name) for name, result in results.items()]


# ---- masks ---------------------------------------------------------------------------------------------------------


def _score_masks(answered: Sequence[AnsweredExample], _: Any) -> list[Score]:
    overlaps = []
    for each in answered:
        truth: Referent = each.example.truth
        rings = [ring for polygon in each.answers[0].get("polygons", ()) for ring in polygon["rings"]]
        overlaps.append(overlap(fill_rings(rings, truth.width, truth.height), truth_mask(truth)))
    images = [each.example.image for each in answered]
    ious = [each.iou for each in overlaps]
    whole = bootstrap([each.shared for each in overlaps], images, [each.either for each in overlaps])
    return [
        _percent("mIoU", mean_iou(overlaps), bootstrap(ious, images), answered),
        _percent("oIoU", cumulative_iou(overlaps), whole, answered),
    ]


def truth_mask(truth: Referent) -> Mask:
    """Return the mask of an object. Raises TableError for damaged run lengths, and for an object without an outline."""
    outline = truth.instance.outline
    if outline is None:
        raise TableError("An object that an expression names has no segmentation.")
    if isinstance(outline, list):
        return fill_rings(outline, truth.width, truth.height)
    try:
        return read_counts(outline["counts"], truth.width, truth.height)
    except ValueError as error:
        raise TableError(str(error)) from None


# ---- questions -----------------------------------------------------------------------------------------------------


def _score_questions(answered: Sequence[AnsweredExample], _: Any) -> list[Score]:
    """Score questions whose answers are published; where none are, there is nothing to score."""
    known = [each for each in answered if each.example.truth.answers]
    shares = [vqa_accuracy(str(each.answers[0].get("text", "")), each.example.truth.answers) for each in known]
    return [_mean("accuracy", shares, known)] if known else []


_SCORING: Mapping[
    Family, Callable[[Sequence[AnsweredExample], Sequence[BenchmarkExample[Any]] | None], list[Score]]
] = {
    "captions": _score_captions,
    "detection": _score_detection,
    "phrases": _score_phrases,
    "expressions": _score_expressions,
    "masks": _score_masks,
    "questions": _score_questions,
}
