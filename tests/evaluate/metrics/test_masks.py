"""Masks, against pycocotools, and overlaps by hand."""

from random import Random

import numpy as np
import pytest
from pycocotools import mask as official

from florence2.evaluate.metrics.masks import cumulative_iou, fill_rings, mean_iou, overlap, read_counts

WIDTH, HEIGHT = 37, 29
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]


def rings(seed: int) -> list[list[float]]:
    """Outlines of 3 to 9 corners, some outside the image, some with equal or whole ones."""
    random = Random(seed)
    draw = random.choice((lambda: random.uniform(-5, 45), lambda: float(random.randint(0, 37))))
    return [[draw() for _ in range(2 * random.randint(3, 9))] for _ in range(random.randint(1, 3))]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools, in NumPy 2
def test_outlines_as_pycocotools_fills_them() -> None:
    for seed in range(300):
        outlines = rings(seed)
        expected = official.decode(official.merge(official.frPyObjects(outlines, HEIGHT, WIDTH)))
        assert np.array_equal(fill_rings(outlines, WIDTH, HEIGHT), expected.astype(bool)), outlines


@pytest.mark.parametrize("ring", [[5, 5], [1, 1, 20, 20], [3, 3, 9, 3], [4, 4, 4, 4, 4, 4]])
def test_outlines_without_an_area(ring: list[float]) -> None:
    assert not fill_rings([ring], WIDTH, HEIGHT).any()


def test_run_lengths_as_pycocotools_reads_them() -> None:
    random = np.random.default_rng(0)
    for density in (0, 0.02, 0.5, 1):
        expected = random.random((HEIGHT, WIDTH)) < density
        packed = official.encode(np.asfortranarray(expected.astype(np.uint8)))["counts"].decode()
        assert np.array_equal(read_counts(packed, WIDTH, HEIGHT), expected)


def test_run_lengths_by_hand() -> None:
    assert read_counts([1, 2, 3], 3, 2).tolist() == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize("counts", [[1, 2], [-1, 7], [7], "0", "\x7f", "P" * 40, "ü", "o"])
def test_damaged_run_lengths(counts: str | list[int]) -> None:
    with pytest.raises(ValueError, match="Run lengths"):
        read_counts(counts, 3, 2)


@pytest.mark.parametrize(
    ("answer", "iou"),
    [
        ([SQUARE], 1),
        ([[2, 2, 7, 2, 7, 12, 2, 12]], 0.5),  # exactly one half
        ([], 0),
        ([[20, 20, 25, 20, 25, 25, 20, 25]], 0),
        ([[2, 2, 12, 2, 12, 7, 2, 7], [2, 7, 12, 7, 12, 12, 2, 12]], 1),  # two rings that meet
        ([SQUARE, SQUARE], 1),
        ([[2, 2, 12, 2, 12, 12, 2, 12, 2, 2, 4, 4, 4, 10, 10, 10, 10, 4, 4, 4]], 64 / 100),  # a hole in one ring
    ],
)
def test_overlaps_by_hand(answer: list[list[float]], iou: float) -> None:
    truth = fill_rings([SQUARE], WIDTH, HEIGHT)
    assert overlap(fill_rings(answer, WIDTH, HEIGHT), truth).iou == pytest.approx(iou)


def test_small_things_count_the_same_in_the_mean() -> None:
    large, small = np.ones((10, 10), bool), np.zeros((10, 10), bool)
    small[0, 0] = True
    overlaps = [overlap(large, large), overlap(np.zeros_like(small), small)]
    assert mean_iou(overlaps) == 0.5
    assert cumulative_iou(overlaps) == 100 / 101


def test_nothing_to_compare() -> None:
    empty = np.zeros((2, 2), bool)
    assert overlap(empty, empty).iou == 0
    assert mean_iou([]) == cumulative_iou([]) == 0
