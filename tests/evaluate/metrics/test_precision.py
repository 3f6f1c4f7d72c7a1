"""Average precision by hand; `tests/evaluate/test_detection.py` compares samples with pycocotools."""

import numpy as np
import pytest

from florence2.evaluate.metrics.precision import RankedBoxes, mean_precisions


def ranked(images: list[int], right: list[int], truths: list[int], wrong: list[int] | None = None) -> RankedBoxes:
    hits = np.asarray([right], bool)
    misses = ~hits if wrong is None else np.asarray([wrong], bool)
    return RankedBoxes(np.asarray(images, np.int64), hits, misses, np.asarray(truths, np.int64))


def precisions(*categories: RankedBoxes, counts: list[list[int]]) -> list[float]:
    return [float(each) for each in mean_precisions(categories, np.asarray(counts, np.int64))]


def test_right_before_wrong_and_wrong_before_right() -> None:
    """The image 0 has one object and the image 1 another: a right box, a wrong one and a right one, ranked so."""
    boxes = ranked([0, 0, 1], [1, 0, 1], [1, 1])
    # precision 1 at the recalls 0 to 0.5, which are 51 of 101, and 2/3 from there on
    assert precisions(boxes, counts=[[1, 1]]) == pytest.approx([(51 + 50 * 2 / 3) / 101])
    # without the image 1, the recall is 1 at the first box; without the image 0, at the only one
    assert precisions(boxes, counts=[[1, 0], [0, 1], [2, 0]]) == pytest.approx([1, 1, 1])


def test_objects_that_were_not_found_lower_the_recall() -> None:
    assert precisions(ranked([0], [1], [4]), counts=[[1]]) == pytest.approx([26 / 101])  # recalls 0 to 0.25
    assert precisions(ranked([], [], [2]), counts=[[1]]) == [0]


def test_boxes_that_do_not_count_change_nothing() -> None:
    boxes = ranked([0, 0], [0, 1], [1], wrong=[0, 0])
    assert precisions(boxes, counts=[[1]]) == [1]


@pytest.mark.filterwarnings("error")
def test_only_categories_with_objects_count() -> None:
    with_objects, without = ranked([0], [1], [1, 0]), ranked([0, 1], [0, 0], [0, 0])
    assert precisions(with_objects, without, counts=[[1, 1]]) == [1]
    assert precisions(with_objects, without, counts=[[0, 1]]) == [0]  # a sample without any object
    assert precisions(without, counts=[[1, 1], [2, 0]]) == [0, 0]
