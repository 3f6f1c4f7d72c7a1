"""Boxes and phrases. Recall of phrases is that of MDETR's evaluator, recorded by `python -m parity.record_metrics`."""

import pytest

from florence2.evaluate.metrics.boxes import box_accuracy, box_ious, enclosing_box, phrase_recall
from parity.metric_cases import draw_sentences
from parity.record_metrics import SEEDS
from parity.records import read_record


@pytest.mark.parametrize(("name", "merged"), [("any", False), ("merged", True)])
def test_recorded_recall(name: str, merged: bool) -> None:
    expected = read_record("evaluate/flickr.json")[name]
    sentences = draw_sentences(len(expected), SEEDS["sentences"])
    assert len(expected) == 500
    own = [
        phrase_recall([each.boxes for each in phrases], [each.truths for each in phrases], merged=merged)
        for phrases in sentences
    ]
    assert own == expected
    assert 0.2 < sum(own) / len(own) < 0.9


def test_the_two_ways_differ() -> None:
    recorded = read_record("evaluate/flickr.json")
    assert recorded["any"] != recorded["merged"]


def test_overlaps_by_hand() -> None:
    ious = box_ious([[0, 0, 10, 10], [20, 20, 30, 30]], [[0, 0, 10, 10], [0, 5, 10, 15], [5, 5, 5, 5]])
    assert ious.tolist() == [[1, 50 / 150, 0], [0, 0, 0]]
    assert box_ious([[5, 5, 5, 5]], [[5, 5, 5, 5]]).tolist() == [[0]]


TRUTH = (0, 0, 10, 10)


@pytest.mark.parametrize(
    ("boxes", "right"),
    [
        ([], 0),
        ([(0, 0, 10, 5)], 1),  # exactly one half
        ([(0, 0, 10, 4.99)], 0),
        ([(0, 0, 10, 20)], 1),
        ([(20, 20, 30, 30), (0, 0, 10, 10)], 0),  # the first one counts
        ([(0, 0, 10, 10), (20, 20, 30, 30)], 1),
    ],
)
def test_accuracy_by_hand(boxes: list[tuple[float, ...]], right: int) -> None:
    assert box_accuracy([boxes], [TRUTH]) == right
    assert box_accuracy([boxes, [TRUTH]], [TRUTH, TRUTH]) == (right + 1) / 2


def test_nothing_asked() -> None:
    assert box_accuracy([], []) == 0
    assert phrase_recall([], [], merged=False) == 0


def test_enclosing_box() -> None:
    assert enclosing_box([(5, 1, 9, 3), (2, 2, 7, 8)]) == [2, 1, 9, 8]
