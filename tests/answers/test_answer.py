"""Generated text -> Answer, and the reference's dict."""

import json
import math
from typing import Any

import pytest
from PIL import Image

from florence2.answers.answer import Answer, parse_answer
from florence2.inputs.tasks import TASKS, AnswerKind
from parity.recipe import make_picture
from parity.records import compare_answers, read_record

SIZE = (1000, 500)
BOX = "<loc_100><loc_200><loc_300><loc_400>"
BOX_XYXY = (100.5, 100.25, 300.5, 200.25)


def parse(kind: AnswerKind, text: str, task: str = "<T>") -> Answer:
    return parse_answer(task, kind, text, SIZE)


def with_scores(kind: AnswerKind, pieces: list[tuple[str, float]], task: str = "<T>") -> Answer:
    """An answer from pieces of text with their probabilities; the start id is added."""
    texts = [piece for piece, _ in pieces]
    return parse_answer(
        task,
        kind,
        "</s>" + "".join(texts),
        SIZE,
        token_ids=range(len(texts) + 1),
        token_logprobs=[math.log(p) for _, p in pieces],
        token_texts=["</s>", *texts],
    )


def test_all_recorded_answers() -> None:
    for row in compare_answers():
        assert row.equal == row.total and (row.difference or 0.0) < 1e-6, row


def test_text() -> None:
    answer = parse("text", "</s><s>A green car.</s><pad><pad>")
    assert answer.text == "A green car." == str(answer)
    assert answer.to_florence() == {"<T>": "A green car.<pad><pad>"}
    assert answer.boxes == () and answer.score is None


def test_boxes_in_pixels() -> None:
    answer = parse("boxes", f"</s><s>car{BOX}wheel{BOX}</s>")
    assert [(box.label, box.xyxy) for box in answer.boxes] == [("car", BOX_XYXY), ("wheel", BOX_XYXY)]
    proposals = parse("proposals", f"</s><s>{BOX}<loc_1><loc_2></s>")
    assert [(box.label, box.xyxy) for box in proposals.boxes] == [("", BOX_XYXY)]
    assert proposals.to_florence() == {"<T>": {"bboxes": [list(BOX_XYXY)], "labels": [""]}}


def test_unicode_labels_are_kept_and_only_the_reference_loses_them() -> None:
    answer = parse("boxes", f"naïve 日本{BOX}")
    assert answer.boxes[0].label == "naïve 日本"
    assert answer.to_florence()["<T>"]["labels"] == ["nave "]


def test_leftovers_of_tags_are_cleaned_and_only_the_reference_keeps_them() -> None:
    answer = parse("boxes", f"<loc_5><od>{BOX}")
    assert answer.boxes[0].label == "" and answer.to_florence()["<T>"]["labels"] == ["od>"]
    quads = parse("quads", "</s><s>STOP" + BOX * 2 + "</s>")
    assert quads.quads[0].label == "STOP" and quads.to_florence()["<T>"]["labels"] == ["</s>STOP"]
    assert parse("boxes", f"a>b{BOX}").boxes[0].label == "a>b"


def test_quads_in_pixels() -> None:
    answer = parse("quads", "STOP" + BOX + BOX + "\n出口" + BOX + BOX)
    assert [(quad.label, quad.xyxyxyxy) for quad in answer.quads] == [("STOP", BOX_XYXY * 2), ("出口", BOX_XYXY * 2)]


def test_polygons_in_pixels() -> None:
    answer = parse("polygons", f"<poly>{BOX}</poly><poly>{BOX}<sep>{BOX}</poly>")
    assert [polygon.rings for polygon in answer.polygons] == [(BOX_XYXY,), (BOX_XYXY,) * 2]
    assert answer.to_florence()["<T>"]["polygons"] == [[list(BOX_XYXY)], [list(BOX_XYXY)] * 2]


def test_an_outline_of_one_number_is_empty() -> None:
    answer = parse("polygons", f"<loc_1><sep>{BOX}<sep>")
    assert answer.to_florence()["<T>"]["polygons"][0][0] == [] and [len(r) for r in answer.polygons[0].rings] == [4]


def test_boxes_or_polygons() -> None:
    boxes = parse("boxes_or_polygons", f"cat{BOX}")
    assert boxes.boxes[0].label == "cat" and not boxes.polygons
    polygons = parse("boxes_or_polygons", f"cat<poly>{BOX}</poly>")
    assert polygons.polygons[0].label == "cat" and not polygons.boxes
    assert polygons.to_florence()["<T>"] == {
        "bboxes": [],
        "bboxes_labels": [],
        "polygons": [[list(BOX_XYXY)]],
        "polygons_labels": ["cat"],
    }


def test_scores_are_geometric_means_over_the_location_tokens() -> None:
    """car: (0.5 * 0.5 * 0.5 * 0.0625)^(1/4) = (1/128)^(1/4) = 0.29730; wheel: 0.8 each = 0.8."""
    pieces = [("<s>", 1.0), ("car", 0.1)] + [
        (f"<loc_{i}>", p) for i, p in zip(range(4), (0.5, 0.5, 0.5, 0.0625), strict=True)
    ]
    pieces += [("wh", 0.2), ("eel", 0.3)] + [(f"<loc_{i}>", 0.8) for i in range(4)] + [("</s>", 0.9)]
    answer = with_scores("boxes", pieces)
    assert [box.score for box in answer.boxes] == pytest.approx([0.29730, 0.8], abs=1e-5)
    assert answer.to_florence()["<T>"]["scores"] == pytest.approx([0.29730, 0.8], abs=1e-5)


@pytest.mark.parametrize("kind", ["phrases", "proposals", "quads", "polygons", "boxes_or_polygons"])
def test_every_kind_gets_scores(kind: AnswerKind) -> None:
    count = 8 if kind == "quads" else 4
    pieces = [("<s>", 1.0), ("cat", 0.1)] + [(f"<loc_{i}>", 0.25) for i in range(count)] + [("</s>", 0.5)]
    answer = with_scores(kind, pieces)
    shapes: list[Any] = [*answer.boxes, *answer.quads, *answer.polygons]
    assert [item.score for item in shapes] == pytest.approx([0.25])
    assert "scores" not in answer.to_florence()["<T>"]


def test_the_score_of_a_text_is_that_of_its_own_tokens() -> None:
    answer = with_scores("text", [("<s>", 1.0), ("a", 0.25), (" cat", 1.0), ("</s>", 0.001)])
    assert answer.score == pytest.approx(0.5)


def test_scores_survive_text_between_phrases_where_the_reference_loses_its_place() -> None:
    pieces = [("<s>", 1.0), ("junk", 0.9), ("<loc_1>", 0.01), ("<loc_2>", 0.01), ("<od>", 0.9), ("car", 0.9)]
    pieces += [(f"<loc_{i}>", 0.5) for i in range(4)]
    answer = with_scores("boxes", pieces)
    assert answer.boxes[0].score == pytest.approx(0.5)
    assert answer.to_florence()["<T>"]["scores"][0] != pytest.approx(0.5)


def test_letters_spread_over_tokens_do_not_shift_scores() -> None:
    """One character as three tokens, each shown as U+FFFD on its own."""
    pieces = [("<s>", 1.0), ("�", 0.9), ("�", 0.9), ("�", 0.9)] + [(f"<loc_{i}>", 0.5) for i in range(4)]
    texts = [piece for piece, _ in pieces]
    answer = parse_answer(
        "<T>",
        "boxes",
        "</s><s>日<loc_0><loc_1><loc_2><loc_3>",
        SIZE,
        token_ids=range(9),
        token_logprobs=[math.log(p) for _, p in pieces],
        token_texts=["</s>", *texts],
    )
    assert answer.boxes[0].label == "日" and answer.boxes[0].score == pytest.approx(0.5)


def test_a_quad_without_a_label_has_its_score() -> None:
    """The start id's `</s>` counts as its label, as in the reference."""
    pieces = [("<s>", 1.0)]
    for label, p in (("", 0.1), ("hello", 0.5), ("world", 0.9)):
        pieces += [(label, 1.0)] * bool(label) + [(f"<loc_{i}>", p) for i in range(8)]
    quads = with_scores("quads", [*pieces, ("</s>", 1.0)]).quads
    assert [quad.label for quad in quads] == ["", "hello", "world"]
    assert [quad.score for quad in quads] == pytest.approx([0.1, 0.5, 0.9])


def test_json_keeps_what_is_there() -> None:
    answer = parse("boxes", f"été{BOX}")
    values: dict[str, Any] = json.loads(answer.to_json())
    assert values == {
        "task": "<T>",
        "kind": "boxes",
        "text": f"été{BOX}",
        "raw_text": f"été{BOX}",
        "image_size": [1000, 500],
        "boxes": [{"xyxy": list(BOX_XYXY), "label": "été", "score": None, "confidence": None}],
    }
    assert "\n" not in answer.to_json() and "été" in answer.to_json()
    scored = with_scores("text", [("<s>", 1.0), ("a", 0.5)])
    assert "token_ids" not in scored.to_dict() and scored.to_dict(tokens=True)["token_texts"] == ["</s>", "<s>", "a"]
    assert parse("boxes_or_polygons", "nothing").to_dict()["polygons"] == []


def test_printing_for_people() -> None:
    assert str(parse("boxes", f"car{BOX}")) == "car  100.5 100.2 300.5 200.2"
    assert str(parse("boxes", "no boxes here")) == "(nothing found)"


def test_answers_are_frozen_and_equal_by_value() -> None:
    answer = parse("text", "x")
    with pytest.raises(AttributeError):
        answer.text = "y"  # type: ignore[misc]
    assert answer == parse("text", "x")


def test_drawing_leaves_the_image_alone() -> None:
    image = make_picture(1, *SIZE)
    before = image.tobytes()
    drawn = parse("boxes", f"car{BOX}").draw(image)
    assert drawn.size == SIZE and image.tobytes() == before and drawn.tobytes() != before
    assert drawn.getpixel((300, 150)) != image.getpixel((300, 150))  # the right edge of the box
    assert drawn.getpixel((600, 400)) == image.getpixel((600, 400))


def drawn_pixels(answer: Answer, places: list[tuple[int, int]]) -> list[bool]:
    """Whether each place of a white image is coloured by the drawing."""
    drawn = answer.draw(Image.new("RGB", SIZE, "white"))
    return [drawn.getpixel(place) != (255, 255, 255) for place in places]


def test_a_box_is_drawn_as_its_four_edges() -> None:
    answer = parse("proposals", BOX)  # 100 to 300 by 100 to 200 pixels, without a label
    edges = [(200, 100), (300, 150), (200, 200), (100, 150)]
    assert drawn_pixels(answer, edges) == [True] * 4
    assert drawn_pixels(answer, [(200, 150), (150, 125), (250, 175), (50, 150), (350, 150)]) == [False] * 5


def test_a_quad_is_drawn_as_its_four_edges() -> None:
    # (200, 50), (600, 100), (550, 300), (150, 250) in pixels; corners of a quad need not be square
    corners = [(200, 50), (600, 100), (550, 300), (150, 250)]
    bins = "".join(f"<loc_{x}><loc_{2 * y}>" for x, y in corners)
    answer = parse("quads", f"a{bins}")
    pairs = zip(corners, corners[1:] + corners[:1], strict=True)
    middles = [((x1 + x2) // 2, (y1 + y2) // 2) for (x1, y1), (x2, y2) in pairs]
    assert len(answer.quads) == 1 and drawn_pixels(answer, middles) == [True] * 4
    assert drawn_pixels(answer, [(375, 175), (700, 200), (150, 60)]) == [False] * 3


def test_a_polygon_is_filled_and_each_of_its_rings_is_drawn() -> None:
    def square(x: int, y: int) -> str:
        return "".join(f"<loc_{a}><loc_{2 * b}>" for a, b in ((x, y), (x + 100, y), (x + 100, y + 100), (x, y + 100)))

    answer = parse("polygons", f"{square(100, 100)}<sep>{square(600, 300)}")
    assert [len(polygon.rings) for polygon in answer.polygons] == [2]
    assert drawn_pixels(answer, [(150, 150), (650, 350), (100, 150), (700, 350)]) == [True] * 4
    assert drawn_pixels(answer, [(400, 250), (150, 350), (650, 150)]) == [False] * 3


def test_the_fifteen_tasks_have_the_recorded_kinds() -> None:
    recorded = {record["task"] for record in read_record("post.json")["post"]}
    assert set(TASKS) - recorded == set()
