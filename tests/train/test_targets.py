"""What is built is read back by the parser of answers, to half a bin."""

import pytest

from florence2.answers.answer import parse_answer
from florence2.errors import PromptError
from florence2.train.targets import boxes_target, location_tokens, polygons_target, quads_target

SIZE = (640, 480)


def test_locations_never_leave_the_vocabulary() -> None:
    assert location_tokens([640, 480, 9999, -3], SIZE) == "<loc_999><loc_999><loc_999><loc_0>"
    assert location_tokens([0.0, 0.0, 0.64, 0.48], SIZE) == "<loc_0><loc_0><loc_1><loc_1>"


def test_boxes_come_back() -> None:
    boxes = [("café table", (10.0, 20.0, 110.0, 140.0)), ("cup", (0.0, 0.0, 640.0, 480.0))]
    answer = parse_answer("<OD>", "boxes", f"</s><s>{boxes_target(boxes, SIZE)}</s>", SIZE)
    assert [box.label for box in answer.boxes] == ["café table", "cup"]
    for box, (_, wanted) in zip(answer.boxes, boxes, strict=True):
        assert box.xyxy == pytest.approx(wanted, abs=0.33)


def test_bare_boxes_come_back() -> None:
    text = boxes_target([("", (10, 20, 110, 140)), ("", (1, 2, 3, 4))], SIZE)
    assert len(parse_answer("<REGION_PROPOSAL>", "proposals", text, SIZE).boxes) == 2


def test_quads_come_back() -> None:
    quad = (10.0, 10.0, 100.0, 14.0, 99.0, 40.0, 9.0, 36.0)
    answer = parse_answer("<OCR_WITH_REGION>", "quads", quads_target([("EXIT 5", quad)], SIZE), SIZE)
    assert answer.quads[0].label == "EXIT 5" and answer.quads[0].xyxyxyxy == pytest.approx(quad, abs=0.33)


def test_polygons_come_back() -> None:
    rings = [(10.0, 10.0, 100.0, 14.0, 99.0, 40.0), (200.0, 200.0, 300.0, 200.0, 300.0, 300.0, 200.0, 300.0)]
    answer = parse_answer("<REGION_TO_SEGMENTATION>", "polygons", polygons_target(rings, SIZE), SIZE)
    assert [len(ring) for ring in answer.polygons[0].rings] == [6, 8]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: boxes_target([("cup", (110, 20, 10, 140))], SIZE), "x1 <= x2"),
        (lambda: boxes_target([("cup", (1, 2, 3))], SIZE), "x1, y1, x2, y2"),
        (lambda: boxes_target([("<loc_1>", (1, 2, 3, 4))], SIZE), "leave out '<'"),
        (lambda: quads_target([("a", (1, 2, 3, 4))], SIZE), "4 numbers"),
        (lambda: polygons_target([(1, 2, 3, 4)], SIZE), "three points"),
        (lambda: location_tokens([1, float("nan")], SIZE), "nan"),
    ],
)
def test_what_cannot_be_written_is_refused(build, message) -> None:
    with pytest.raises(PromptError, match=message):
        build()


def test_a_long_label_is_cut_in_the_message() -> None:
    with pytest.raises(PromptError) as refused:
        boxes_target([("<" * 5000, (1, 2, 3, 4))], SIZE)
    assert len(str(refused.value)) < 300
