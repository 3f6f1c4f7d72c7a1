"""The confidence of regions and texts, computed by hand."""

import importlib
import math
import sys
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from florence2.answers.answer import Answer, Box, Polygon, Quad, parse_answer
from florence2.answers.cascade import Cascade
from florence2.answers.confidence import Calibration, Likelihoods, Parts, rate_regions
from florence2.errors import OptionError
from florence2.inputs.tasks import AnswerKind

BOX = [("<loc_100>", 1.0), ("<loc_200>", 1.0), ("<loc_200>", 1.0), ("<loc_400>", 1.0)]
"""100 bins wide and 200 high, so that 8 and 12 bins next to a location are near."""


def likelihoods(pieces: list[tuple[str, float]], spread: dict[int, dict[int, float]]) -> Likelihoods:
    """The probability of each token; a location has it at its own bin, unless `spread` says otherwise."""
    locations = np.zeros((len(pieces), 1000), np.float32)
    for i, (text, probability) in enumerate(pieces):
        for bin, share in spread.get(i, {int(text[5:-1]): probability} if text.startswith("<loc_") else {}).items():
            locations[i, bin] = share
    with np.errstate(divide="ignore"):
        return Likelihoods(np.log([probability for _, probability in pieces]), locations)


def read(
    kind: AnswerKind,
    pieces: list[tuple[str, float]],
    spread: dict[int, dict[int, float]] | None = None,
    calibration: Calibration | None = None,
) -> Answer:
    texts = [text for text, _ in pieces]
    return parse_answer(
        "<T>",
        kind,
        "".join(texts),
        (1000, 1000),
        token_texts=("</s>", *texts),
        likelihoods=likelihoods(pieces, spread or {}),
        calibration=calibration or Calibration({}),
    )


def test_the_label_times_the_least_sure_edge() -> None:
    spread = {3: {100: 0.1, 92: 0.2, 108: 0.3, 109: 0.15, 91: 0.15}, 4: {200: 0.5, 212: 0.4, 213: 0.1}}
    pieces = [("<s>", 0.3), ("red", 0.8), (" car", 0.5), *BOX, ("</s>", 0.2)]
    (box,) = read("boxes", pieces, spread).boxes
    assert box.confidence == pytest.approx(0.8 * 0.5 * (0.1 + 0.2 + 0.3))


def test_boxes_with_one_label_share_it() -> None:
    boxes = read("boxes", [("car", 0.5), *BOX, *BOX[:3], ("<loc_400>", 0.25)]).boxes
    assert [box.confidence for box in boxes] == pytest.approx([0.5, 0.125])


def test_a_proposal_has_no_label_to_doubt() -> None:
    (box,) = read("proposals", [("<s>", 0.1), *BOX[:3], ("<loc_400>", 0.25), ("</s>", 0.1)]).boxes
    assert box.confidence == pytest.approx(0.25)


def test_quads_and_markers() -> None:
    corners = [(f"<loc_{bin}>", 0.9) for bin in (100, 100, 300, 100, 300, 200, 100, 200)]
    quads = read("quads", [("</s>", 0.1), ("<s>", 0.1), ("STOP", 0.5), *corners, ("GO", 0.25), *corners]).quads
    assert [quad.confidence for quad in quads] == pytest.approx([0.45, 0.225])


def test_all_rings_of_a_polygon_count() -> None:
    ring = [(f"<loc_{bin}>", 0.9) for bin in (100, 100, 300, 100, 300, 200)]
    far = [(f"<loc_{bin}>", 0.6) for bin in (500, 500, 600, 500, 600, 600, 7)]  # an x without its y is no point
    (polygon,) = read("polygons", [*ring, ("<sep>", 0.1), *far]).polygons
    assert polygon.confidence == pytest.approx(0.6) and len(polygon.rings) == 2


def test_a_point_of_an_outline_may_lie_further_along_it() -> None:
    """The outline is 200 bins wide: 60 bins away is near, and 61 is not; of a quad so large, 12 bins and 13."""
    ring = [(f"<loc_{bin}>", 0.9) for bin in (100, 100, 300, 100, 300, 300, 100, 300)]
    spread = {0: {100: 0.3, 160: 0.2, 161: 0.4, 112: 0.05, 113: 0.01}}
    (polygon,) = read("polygons", ring, spread).polygons
    assert polygon.confidence == pytest.approx(0.3 + 0.2 + 0.05 + 0.01)
    (quad,) = read("quads", [("GO", 1.0), *ring], {1: spread[0]}).quads
    assert quad.confidence == pytest.approx(0.3 + 0.05)


def test_a_text_is_right_when_all_of_it_is() -> None:
    answer = read("text", [("<s>", 0.1), ("a", 0.5), ("b", 0.5), ("</s>", 0.8)])
    assert answer.confidence == pytest.approx(0.2) and answer.calibrated is False and not answer.boxes


def test_a_text_without_its_end_is_not_right() -> None:
    assert read("text", [("<s>", 1.0), ("a", 0.9), ("b", 0.9)]).confidence == 0
    generous = Calibration({"text": ((0.0, 1.0), (0.4, 0.9))})
    assert read("text", [("a", 0.9)], calibration=generous).confidence == 0


def test_without_likelihoods_there_is_none() -> None:
    answer = parse_answer("<T>", "boxes", "car<loc_1><loc_2><loc_3><loc_4>", (10, 10))
    assert answer.boxes[0].confidence is None and answer.calibrated is None and answer.confidence is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_no_confidence(bad: float) -> None:
    pieces = [("car", 1.0), *BOX]
    broken = likelihoods(pieces, {})
    broken.logprobs[:], broken.locations[:] = bad, bad
    (part,) = rate_regions("boxes", ["</s>", *(text for text, _ in pieces)], broken)
    assert part.raw == 0


def test_a_box_at_the_border_and_one_without_an_extent() -> None:
    pieces = [("car", 1.0), *[(f"<loc_{bin}>", 0.5) for bin in (0, 0, 999, 999)]]
    assert read("boxes", pieces).boxes[0].confidence == pytest.approx(0.5)
    assert read("boxes", [("car", 1.0), *[("<loc_7>", 0.5)] * 4]).boxes[0].confidence == pytest.approx(0.5)


def test_a_calibration_is_for_a_kind_of_answer() -> None:
    calibration = Calibration({"boxes": ((0.0, 0.5, 1.0), (0.0, 0.9, 1.0))})
    answer = read("boxes", [("car", 0.25), *BOX], calibration=calibration)
    assert answer.boxes[0].confidence == pytest.approx(0.45) and answer.calibrated is True
    proposals = read("proposals", [("car", 0.25), *BOX], calibration=calibration)
    assert proposals.calibrated is False


def test_parts() -> None:
    assert Parts(0.5, (), ()).raw == 0.5 and Parts(0.5, (0.5, 0.9), (1, 2)).raw == 0.25


def answer_with(*confidences: float | None, calibrated: bool | None = True) -> Answer:
    answer = read("boxes", [("car", 1.0), *BOX])
    boxes = tuple(Box((1.0, 2.0, 3.0, 44.0), "cat" * (i + 1), 0.1, c) for i, c in enumerate(confidences))
    return replace(answer, boxes=boxes, calibrated=calibrated)


def test_printed_in_columns_with_their_names() -> None:
    assert str(answer_with(0.987, 1.0)).splitlines() == [
        "label   confidence  x1 y1 x2 y2 in pixels",
        "cat           0.99  1.0 2.0 3.0 44.0",
        "catcat        1.00  1.0 2.0 3.0 44.0",
    ]
    assert str(answer_with(0.5, calibrated=False)).splitlines()[0] == "label  raw confidence  x1 y1 x2 y2 in pixels"
    assert str(answer_with(None, calibrated=None)).splitlines() == [
        "label  score  x1 y1 x2 y2 in pixels",
        "cat     0.10  1.0 2.0 3.0 44.0",
    ]
    proposals = replace(answer_with(0.5), boxes=(Box((1.0, 2.0, 3.0, 44.0), "", 0.1, 0.5),))
    assert str(proposals).splitlines() == ["confidence  x1 y1 x2 y2 in pixels", "      0.50  1.0 2.0 3.0 44.0"]


def test_quads_and_polygons_name_their_coordinates() -> None:
    corners = [(f"<loc_{bin}>", 0.9) for bin in (100, 100, 300, 100, 300, 200, 100, 200)]
    assert "x1 y1 ... x4 y4 in pixels" in str(read("quads", [("GO", 0.5), *corners]))
    assert "x1 y1 x2 y2 ... in pixels" in str(read("polygons", corners[:6]))


def test_a_notebook_shows_it() -> None:
    page = answer_with(0.987, 0.5)._repr_html_() or ""
    assert "<th>confidence</th>" in page and "<td>0.99</td>" in page


def test_a_threshold() -> None:
    answer = replace(answer_with(0.2, 0.5), alternatives=(answer_with(0.6, 0.3),))
    sure = answer.with_confidence(0.5)
    assert [box.confidence for box in sure.boxes] == [0.5] and (sure.min_confidence, sure.left_out) == (0.5, 1)
    assert [box.confidence for box in sure.alternatives[0].boxes] == [0.6]
    assert answer.with_confidence(0) == answer and sure.to_dict()["left_out"] == 1
    again = sure.with_confidence(np.float32(0.75))
    assert str(again) == "(nothing at or above 0.75; 2 left out)"
    assert str(answer_with().with_confidence(0.5)) == "(nothing found)"


@pytest.mark.parametrize("least", [math.nan, -0.1, 1.1, "0.5", True, None, [0.5]])
def test_a_threshold_is_a_share(least: Any) -> None:
    cascade = Cascade.join(answer_with(), answer_with(0.9), [answer_with()])
    for answer in (answer_with(0.5), cascade):
        with pytest.raises(OptionError, match="must be a number from 0 to 1"):
            answer.with_confidence(least)


def test_a_threshold_needs_confidences() -> None:
    unrated = answer_with(None, calibrated=None)
    for answer in (unrated, Cascade.join(answer_with(), unrated, [answer_with()])):
        with pytest.raises(OptionError, match="have no confidence .* without confidence=False"):
            answer.with_confidence(0.5)
        assert answer.with_confidence(0) == answer


def test_a_threshold_of_a_cascade_takes_box_and_outline_together() -> None:
    grounding = answer_with(0.9, 0.2, 0.8)
    outline = replace(grounding, kind="polygons", boxes=(), polygons=(Polygon(((1.0, 2.0, 3.0, 4.0),), "", 0.1, 0.95),))
    weak = replace(outline, polygons=(replace(outline.polygons[0], confidence=0.1),))
    cascade = Cascade.join(answer_with(), grounding, [outline, outline, weak]).with_confidence(0.5)
    assert [box.confidence for box in cascade.boxes] == [0.9, 0.8] and len(cascade.segments) == 2
    assert [polygon.confidence for polygon in cascade.polygons] == [0.95]
    assert cascade.left_out == 2  # a box, and the outline of another


def test_rows_carry_both_numbers() -> None:
    values = answer_with(0.25).to_dict()
    assert values["boxes"] == [{"xyxy": [1.0, 2.0, 3.0, 44.0], "label": "cat", "score": 0.1, "confidence": 0.25}]
    assert values["calibrated"] is True


class Detections:
    """Stands for those of supervision, which is not installed here; tests/interop has the real ones."""

    def __init__(self, **values: Any):
        self.values = values

    @classmethod
    def empty(cls) -> "Detections":
        return cls()


@pytest.fixture
def supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("supervision")
    module.Detections = Detections  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", module)


@pytest.mark.usefixtures("supervision")
def test_detections_of_boxes() -> None:
    boxes = (Box((3.0, 2.0, 1.0, 4.0), "dog", 0.1, 0.5), Box((5.0, 6.0, 7.0, 8.0), "car", 0.1, 0.25))
    answer = replace(answer_with(0.5), boxes=boxes)
    values = answer.to_supervision().values
    assert values["xyxy"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]] and values["mask"] is None
    assert values["confidence"].tolist() == [0.5, 0.25] and values["class_id"].tolist() == [1, 0]
    assert values["data"]["class_name"].tolist() == ["dog", "car"] and len(values["data"]) == 1
    own = answer.to_supervision(["dog", "cat", "dog", "car"]).values
    assert own["class_id"].tolist() == [0, 2] and answer.to_supervision(["dog"]).values["class_id"].tolist() == [0, -1]
    unrated = replace(answer, boxes=(*boxes, Box((5.0, 6.0, 7.0, 8.0), "car", 0.1, None)))
    assert unrated.to_supervision().values["confidence"] is None
    assert answer_with().to_supervision().values == {}
    for wrong in ("car", 3):
        with pytest.raises(OptionError, match=r"give a list of labels, such as \['car', 'dog'\]"):
            answer.to_supervision(wrong)  # type: ignore[arg-type]


@pytest.mark.usefixtures("supervision")
def test_detections_of_quads_and_outlines() -> None:
    corners = (1.0, 2.0, 9.0, 2.0, 9.0, 5.0, 1.0, 5.0)
    quads = replace(answer_with(), kind="quads", quads=(Quad(corners, "GO", 0.1, 0.5),)).to_supervision().values
    assert quads["data"]["xyxyxyxy"].tolist() == [[[1, 2], [9, 2], [9, 5], [1, 5]]]
    assert quads["xyxy"].tolist() == [[1, 2, 9, 5]] and quads["mask"] is None
    rings = ((), (3.0, 3.0), corners)
    outlines = replace(answer_with(), polygons=(Polygon(rings, "", 0.1, 0.5), Polygon((), "", 0.1, 0.5)))
    values = replace(outlines, image_size=(12, 8)).to_supervision().values
    assert values["xyxy"].tolist() == [[1, 2, 9, 5], [0, 0, 0, 0]] and list(values["data"]) == ["class_name"]
    assert values["mask"].shape == (2, 8, 12) and values["mask"].dtype == bool
    rows, columns = np.nonzero(values["mask"][0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 5, 1, 9) and len(rows) == 4 * 9
    mixed = replace(outlines, image_size=(12, 8), boxes=(Box((3.0, 2.0, 5.0, 4.0), "", 0.1, 0.5),))
    assert mixed.to_supervision().values["mask"].sum(axis=(1, 2)).tolist() == [9, 36, 0]


def test_supervision_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(OptionError, match="pip install supervision"):
        answer_with(0.5).to_supervision()
