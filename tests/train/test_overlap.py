"""IoU against areas known from geometry, and matching."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from florence2.answers.answer import Box
from florence2.train.overlap import box_area, match, outline_area, overlaps

SIZE = (400, 200)
Rings = Sequence[Sequence[float]]


def outline_iou(one: Rings, other: Rings) -> float:
    return float(overlaps([outline_area(one, SIZE)], [outline_area(other, SIZE)])[0, 0])


def square(left: float, top: float, side: float) -> tuple[float, ...]:
    return (left, top, left + side, top, left + side, top + side, left, top + side)


def test_boxes() -> None:
    boxes = [Box((0, 0, 100, 100)), Box((50, 0, 150, 100)), Box((100, 0, 200, 100)), Box((0, 0, 100, 72))]
    shapes = [box_area(box, SIZE) for box in boxes]
    expected = [[1, 1 / 3, 0, 0.72], [1 / 3, 1, 1 / 3, 36 / (100 + 72 - 36)]]
    np.testing.assert_allclose(overlaps(shapes[:2], shapes), expected)


def test_a_box_thinner_than_a_bin_is_a_bin_wide() -> None:
    thin, same, wide = (box_area(Box(xyxy), SIZE) for xyxy in ((10, 10, 10, 60), (10, 10, 10, 60), (10, 10, 14, 60)))
    assert thin == pytest.approx([10, 10, 0.4, 50])
    assert overlaps([thin], [same, wide])[0] == pytest.approx([1, 0.1])


def test_swapped_corners_do_not_overlap_what_lies_between() -> None:
    right, swapped = (box_area(Box(xyxy), SIZE) for xyxy in ((10, 10, 90, 90), (90, 90, 10, 10)))
    assert overlaps([right], [swapped])[0, 0] < 0.01


def test_nothing_has_no_overlaps() -> None:
    shape = box_area(Box((0, 0, 9, 9)), SIZE)
    assert overlaps([], [shape, shape]).shape == (0, 2)
    assert overlaps([shape], []).shape == (1, 0)


def test_outlines() -> None:
    whole = [square(100, 40, 80)]
    assert outline_iou(whole, whole) == 1.0
    assert outline_iou(whole, [square(140, 40, 80)]) == pytest.approx(1 / 3, abs=0.005)
    assert outline_iou(whole, [(100, 40, 180, 40, 180, 120)]) == pytest.approx(1 / 2, abs=0.005)
    assert outline_iou(whole, [(140, 40, 180, 80, 140, 120, 100, 80)]) == pytest.approx(1 / 2, abs=0.005)
    angles = [math.radians(4 * k) for k in range(90)]
    circle = [value for angle in angles for value in (140 + 40 * math.cos(angle), 80 + 40 * math.sin(angle))]
    assert outline_iou(whole, [circle]) == pytest.approx(math.pi / 4, abs=0.005)


def test_rings_are_united() -> None:
    halves = [(100, 40, 140, 40, 140, 120, 100, 120), (140, 40, 180, 40, 180, 120, 140, 120)]
    assert outline_iou([square(100, 40, 80)], halves) == pytest.approx(1, abs=0.005)
    assert outline_iou([square(100, 40, 80)], halves[:1]) == pytest.approx(1 / 2, abs=0.005)
    assert outline_iou([square(100, 40, 80)], [square(100, 40, 80), *halves]) == pytest.approx(1, abs=0.005)


def test_a_line_overlaps_itself_and_little_else() -> None:
    point, line, flat = [(100.2, 40.1)], [(100.2, 40.1, 120.2, 40.1)], [(100.2, 40.1, 180.2, 120.1, 100.2, 40.1)]
    for thin in (point, line, flat):
        assert outline_iou(thin, thin) == 1.0
        assert outline_iou([square(100, 40, 80)], thin) < 0.001
        assert outline_iou(thin, [(102.2, 40.1, 120.2, 40.1)]) == 0.0
    assert outline_iou([], []) == outline_iou([square(100, 40, 80)], []) == 0.0


def test_matching_is_one_to_one_and_takes_the_highest_first() -> None:
    ious = np.array([[0.6, 0.9, 0.0], [0.55, 0.8, 0.5]])
    assert match(ious, 0.5) == [(0, 1), (1, 0)]
    assert match(ious, 0.6) == [(0, 1)]
    assert match(ious[:, 2:], 0.5) == [(1, 0)]  # the limit itself is enough
    assert match(np.zeros((0, 3)), 0.5) == match(np.zeros((3, 0)), 0.5) == []
