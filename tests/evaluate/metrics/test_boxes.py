"""Overlaps of boxes, by hand; `tests/evaluate/test_scoring.py` compares phrases with the official code."""

import pytest

from florence2.evaluate.metrics.boxes import box_ious, enclosing_box, is_right


def test_overlaps_by_hand() -> None:
    ious = box_ious([[0, 0, 10, 10], [20, 20, 30, 30]], [[0, 0, 10, 10], [0, 5, 10, 15], [5, 5, 5, 5]])
    assert ious.tolist() == [[1, 50 / 150, 0], [0, 0, 0]]
    assert box_ious([[5, 5, 5, 5]], [[5, 5, 5, 5]]).tolist() == [[0]]
    assert box_ious([[5, 5, 5.5, 5.5]], [[5, 5, 5.5, 5.25]]).tolist() == [[0.5]]  # less than a pixel


TRUTH = (0, 0, 10, 10)


@pytest.mark.parametrize(
    ("boxes", "right"),
    [
        ([], False),
        ([(0, 0, 10, 5)], True),  # exactly one half
        ([(0, 0, 10, 4.99)], False),
        ([(0, 0, 10, 20)], True),
        ([(20, 20, 30, 30), (0, 0, 10, 10)], False),  # the first one counts
        ([(0, 0, 10, 10), (20, 20, 30, 30)], True),
    ],
)
def test_the_first_box_counts(boxes: list[tuple[float, ...]], right: bool) -> None:
    assert is_right(boxes, [TRUTH]) == right
    assert is_right(boxes, [(50, 50, 60, 60), TRUTH]) == right  # any of the truths


def test_enclosing_box() -> None:
    assert enclosing_box([(5, 1, 9, 3), (2, 2, 7, 8)]) == [2, 1, 9, 8]
