"""The one quantiser."""

from typing import Any

import numpy as np
import pytest

import florence2
from florence2.errors import PromptError
from florence2.inputs.coordinates import bins_to_pixels, bins_to_tokens, box_to_tokens, pixels_to_bins


def test_by_hand() -> None:
    """640 wide: a bin is 0.64 pixels, so 33.6 / 0.64 = 52.5 is in bin 52, whose centre is 52.5 * 0.64 = 33.6.

    480 high: 159.6 / 0.48 = 332.5, bin 332, centre 332.5 * 0.48 = 159.6.
    """
    assert pixels_to_bins((33.6, 159.6), (640, 480)) == [52, 332]
    assert bins_to_pixels((52, 332), (640, 480)) == pytest.approx([33.6, 159.6], abs=1e-4)


def test_borders_belong_to_the_last_bin() -> None:
    assert pixels_to_bins((-5, -5, 640, 480), (640, 480)) == [0, 0, 999, 999]
    assert pixels_to_bins((0, 0, 639.99, 479.99), (640, 480)) == [0, 0, 999, 999]


@pytest.mark.parametrize("size", [(640, 480), (1, 1), (333, 517), (8192, 3), (1000, 1000)])
def test_every_bin_comes_back(size: tuple[int, int]) -> None:
    bins = np.stack([np.arange(1000), np.arange(1000)], axis=1)
    assert pixels_to_bins(bins_to_pixels(bins, size), size) == bins.tolist()


def test_any_nesting_keeps_its_shape() -> None:
    rows = [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
    assert np.shape(pixels_to_bins(rows, (10, 10))) == (2, 1, 4)
    assert pixels_to_bins([], (10, 10)) == []


def test_float32_as_the_reference() -> None:
    """(0.5 + 373) * 0.517 rounded once in float32, not in double."""
    assert bins_to_pixels((373, 373), (333, 517)) == [
        float(np.float32(373.5) * np.float32(s / 1000)) for s in (333, 517)
    ]


@pytest.mark.parametrize("bad", [[1, 2, 3], 5, [[1, 2], [3]], ["a", "b"], [float("nan"), 1], [float("inf"), 1]])
def test_wrong_coordinates_get_a_sentence(bad: object) -> None:
    with pytest.raises(PromptError):
        pixels_to_bins(bad, (10, 10))


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(PromptError, match="at least 1 x 1"):
        bins_to_pixels([1, 2], (0, 10))


def test_box_to_tokens() -> None:
    assert box_to_tokens((33.6, 159.6, 597.0, 372.0), (640, 480)) == "<loc_52><loc_332><loc_932><loc_775>"
    assert bins_to_tokens([0, 999]) == "<loc_0><loc_999>"


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((5, 5, 1, 9), "x1 <= x2"),
        ((1, 2, 3), "four numbers"),
        ("abcd", "four numbers"),
        (None, "four numbers"),
        ((700, 1, 800, 9), "outside the image of 640 x 480"),
        ((-9, 1, -1, 9), "outside"),
        ((float("nan"), 1, 2, 3), "x1 <= x2"),
        ((0, 0, float("inf"), 3), "x1 <= x2"),
        ((0, 0, 10**400, 10**400), "four numbers"),
        (b"\1\2\3\4", "four numbers"),
        (5, "four numbers"),
        ((1j, 2, 3, 4), "four numbers"),
    ],
)
def test_wrong_boxes_get_a_sentence(box: object, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        box_to_tokens(box, (640, 480))


def test_the_border_of_the_image_is_inside_at_0_and_outside_at_its_width() -> None:
    """A coordinate c is in the image where 0 <= c < width; a box that touches it is cut, and none beyond is moved in."""
    size = (640, 480)
    assert box_to_tokens((-10, 5, 0, 9), size) == "<loc_0><loc_10><loc_0><loc_18>"
    assert box_to_tokens((5, -9, 9, 0), size) == "<loc_7><loc_0><loc_14><loc_0>"
    assert box_to_tokens((639.99, 479.99, 700, 500), size) == "<loc_999><loc_999><loc_999><loc_999>"
    for outside in ((640, 5, 700, 9), (5, 480, 9, 500), (5, -9, 9, -1), (-9, 5, -0.01, 9), (641, 0, 650, 9)):
        with pytest.raises(PromptError, match="is outside the image of 640 x 480 pixels"):
            box_to_tokens(outside, size)


def test_boxes_much_larger_than_the_image_are_cut() -> None:
    assert box_to_tokens((-1e300, -1e39, 1e39, 1e300), (640, 480)) == "<loc_0><loc_0><loc_999><loc_999>"
    with pytest.raises(PromptError, match="finite numbers"):
        pixels_to_bins((0, 0, 1e39, 1e300), (640, 480))
    with pytest.raises(PromptError, match="rows of numbers"):
        pixels_to_bins((0, 0, 10**400, 1), (640, 480))


@pytest.mark.parametrize("size", [5, None, (5,), (1, 2, 3), ("a", "b"), (0, 5), (float("nan"), 5), (10**400, 5), "ab"])
def test_wrong_image_sizes_get_a_sentence(size: Any) -> None:
    for convert in (bins_to_pixels, pixels_to_bins):
        with pytest.raises(PromptError, match=r"must be \(width, height\), at least 1 x 1 pixels"):
            convert([1, 2], size)


def test_public_names() -> None:
    assert florence2.pixels_to_bins is pixels_to_bins and florence2.bins_to_pixels is bins_to_pixels
