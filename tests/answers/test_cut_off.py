"""An answer that the token limit ended says so wherever it is shown."""

from dataclasses import replace

import pytest
from PIL import Image, ImageChops

from florence2.answers.answer import Answer, parse_answer
from florence2.answers.cascade import Cascade

BOX = "a cup<loc_100><loc_200><loc_700><loc_800>"
SIZE = (320, 200)


def parse(task: str, kind: str, text: str, finish_reason: str | None) -> Answer:
    return parse_answer(task, kind, text, SIZE, finish_reason=finish_reason)


def test_the_text() -> None:
    assert str(parse("<CAPTION>", "text", "a man in", "length")) == "a man in\n(cut off at the token limit)"
    for reason in ("stop", None):
        assert str(parse("<CAPTION>", "text", "a man in", reason)) == "a man in"


def test_the_lines_of_regions() -> None:
    cut, whole = (str(parse("<OD>", "boxes", BOX, reason)).splitlines() for reason in ("length", "stop"))
    assert cut == [*whole, "(cut off at the token limit)"] and len(whole) == 1


@pytest.mark.parametrize("kind", ["boxes", "proposals", "phrases", "quads", "polygons", "boxes_or_polygons"])
def test_an_answer_that_ends_before_its_first_region_is_not_empty(kind: str) -> None:
    cut, whole = (parse("<OD>", kind, "a cu", reason) for reason in ("length", "stop"))
    assert str(cut) == "(cut off at the token limit)" and str(whole) == "(nothing found)"
    assert "cut off" in cut._repr_html_() and "nothing found" in whole._repr_html_()


def test_the_repr() -> None:
    assert repr(parse("<OD>", "boxes", BOX, "length")) == (
        "Answer('<OD>', boxes: 1 box, cut off at the token limit, image 320 x 200)"
    )
    assert "cut" not in repr(parse("<OD>", "boxes", BOX, "stop"))


def test_a_table_in_a_notebook() -> None:
    cut, whole = (parse("<OD>", "boxes", BOX, reason)._repr_html_() for reason in ("length", "stop"))
    assert "<caption>cut off at the token limit</caption>" in cut and "<caption>" not in whole


def test_a_drawing() -> None:
    """Below the regions, in the lower left corner; the size stays."""
    white = Image.new("RGB", SIZE, "white")
    cut, whole = (parse("<OD>", "boxes", BOX, reason).draw(white) for reason in ("length", "stop"))
    left, top, right, bottom = ImageChops.difference(cut, whole).getbbox()
    assert cut.size == SIZE and left < 20 and top > 170 and right < 250 and bottom <= 200


def test_a_cascade_is_cut_where_any_part_is() -> None:
    caption, grounding = parse("<CAPTION>", "text", "a cup", "stop"), parse("<OD>", "phrases", BOX, "stop")
    outline = parse("<REGION_TO_SEGMENTATION>", "polygons", "<loc_1><loc_2><loc_9><loc_2><loc_9><loc_9>", "length")
    cascade = Cascade.join(caption, grounding, [outline])
    assert cascade.is_cut_off and str(cascade).endswith("(cut off at the token limit)")
    assert not replace(cascade, segments=()).is_cut_off
    white = Image.new("RGB", SIZE, "white")
    whole = Cascade.join(caption, grounding, [replace(outline, finish_reason="stop")])
    assert not whole.is_cut_off and cascade.draw(white).tobytes() != whole.draw(white).tobytes()
