"""Regions of rows: clipped, turned the right way, without those that have no area."""

import math
from typing import Any

import pytest

from florence2.dataset.regions import RegionReader, shoelace
from florence2.errors import OptionError
from tests.dataset.rows import boxes, cascade, polygons, quads, row

SIZE = (200, 100)


def read(values: dict[str, Any], least: float | None = None) -> tuple[list[Any], dict[str, int]]:
    reader = RegionReader(least)
    return reader.read(values, SIZE), {name: count for name, count in reader.counts.items() if count}


def test_a_box_inside_stays_as_it_is() -> None:
    (region,), counts = read(boxes("a", ("cat", 0.1, 0.2, 199.9, 100)))
    assert region.box == (0.1, 0.2, 199.9, 100) and counts == {}
    assert (region.label, region.rings, region.is_quad, region.score, region.confidence) == (
        "cat",
        [],
        False,
        0.25,
        0.5,
    )


@pytest.mark.parametrize(
    ("box", "expected", "counts"),
    [
        ((-5, 10, 250, 120), (0, 10, 200, 100), {"clipped": 1}),
        ((50, 40, 10, 20), (10, 20, 50, 40), {"swapped": 1}),
        ((10, 40, 50, 20), (10, 20, 50, 40), {"swapped": 1}),
        ((300, 10, 350, 20), None, {"clipped": 1, "degenerate": 1}),
        ((10, 10, 10, 20), None, {"degenerate": 1}),
        ((math.nan, 10, 20, 20), None, {"degenerate": 1}),
        ((-math.inf, 10, 20, 20), (0, 10, 20, 20), {"clipped": 1}),
    ],
)
def test_boxes_that_do_not_fit(box: Any, expected: Any, counts: dict[str, int]) -> None:
    regions, counted = read(boxes("a", ("cat", *box)))
    assert [region.box for region in regions] == ([expected] if expected else [])
    assert counted == counts


def test_outlines() -> None:
    square, line, outside = [10.0, 10, 30, 10, 30, 30, 10, 30], [0.0, 0, 5, 5], [190.0, 90, 220, 90, 220, 120, 190, 120]
    (first, second), counts = read(polygons("a", ("x", [square, line]), ("", [outside]), ("y", [line, []])))
    assert first.box == (10, 10, 30, 30) and first.rings == [square]
    assert second.box == (190, 90, 200, 100) and second.label == "object"
    assert counts == {"degenerate_rings": 1, "clipped": 1, "degenerate": 1}


def test_the_input_names_an_outline() -> None:
    (region,), _ = read(polygons("a", ("", [[0, 0, 9, 0, 9, 9]]), input="a blue car"))
    assert region.label == "a blue car"
    (region,), _ = read(polygons("a", ("", [[0, 0, 9, 0, 9, 9]])) | {"task": "<REGION_TO_SEGMENTATION>", "input": "x"})
    assert region.label == "object"


def test_quads() -> None:
    corners = [10.0, 10.0, 60.0, 15.0, 60.0, 30.0, 10.0, 25.0]
    (region,), _ = read(quads("a", ("STOP", corners)))
    assert region.is_quad and region.box == (10, 10, 60, 30) and region.rings == [corners] and region.label == "STOP"


def test_a_cascade_joins_box_and_outline() -> None:
    (cup, spoon), counts = read(cascade("a"))
    assert (cup.label, cup.box, cup.rings) == ("a cup", (0, 0, 50, 50), [[0, 0, 50, 0, 50, 50]])
    assert (spoon.label, spoon.box, spoon.rings) == ("a spoon", (60, 10, 90, 40), []) and counts == {}


def test_the_least_confidence() -> None:
    values = boxes("a", ("cat", 0, 0, 9, 9, 0.3), ("dog", 0, 0, 9, 9, 0.31))
    regions, counts = read(values, 0.31)
    assert [region.label for region in regions] == ["dog"] and counts == {"below_min_confidence": 1}
    del values["boxes"][1]["confidence"]
    assert len(read(values, 0.0)[0]) == len(read(values)[0]) == 2
    with pytest.raises(OptionError, match="--min-confidence needs confidences"):
        read(values, 0.3)


@pytest.mark.parametrize(
    "shape",
    [
        *({"boxes": [{"xyxy": [1, 2, 3]}]}, {"boxes": [{"xyxy": [1, "2", 3, 4], "label": "x"}]}, {"boxes": [7]}),
        {"boxes": [{"xyxy": [False, 2, 3, 4], "label": "x"}]},
        *({"boxes": [{"xyxy": [1, 2, 3, 4], "label": "x", "score": score}]} for score in (math.nan, "0.5", True)),
        {"boxes": [{"xyxy": [1, 2, 3, 4], "label": "x", "confidence": math.inf}]},
        *({"boxes": [{"xyxy": [1, 2, 3, 4], "label": 7}]}, {"polygons": [{"rings": [[1, 2, 3]], "label": ""}]}),
    ],
)
def test_values_that_are_not_those_of_a_row(shape: dict[str, Any]) -> None:
    with pytest.raises((AttributeError, LookupError, TypeError, ValueError)):
        read(row("a", **shape))


def test_shoelace() -> None:
    assert shoelace([0, 0, 4, 0, 4, 3]) == 6 and shoelace([4, 3, 4, 0, 0, 0]) == 6
    assert shoelace([]) == shoelace([1, 1]) == shoelace([0, 0, 1, 1]) == shoelace([0, 0, 1, 1, 2, 2]) == 0
    assert shoelace([1e9, 1e9, 1e9 + 1, 1e9, 1e9 + 1, 1e9 + 1]) == 0.5
