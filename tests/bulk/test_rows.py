"""What makes two rows the same work, and what a row says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from florence2.answers.answer import Answer, Box, parse_answer
from florence2.answers.cascade import Cascade
from florence2.bulk.rows import (
    Question,
    Result,
    Row,
    TaskQuestion,
    has_changed,
    is_cut_off,
    restore_result,
    row_key,
)
from florence2.bulk.sources import Source
from florence2.cli.cascade import CascadeQuestion


def test_the_same_work_has_the_same_key() -> None:
    """The place of an image counts, not its name; so do the bytes of stdin, and a cascade's detail."""
    one, other = Source("a.jpg", Path("x/a.jpg"), "a"), Source("a.jpg", Path("y/a.jpg"), "a")
    pipes = [Source("-", data, "stdin") for data in (b"1", b"2", b"1")]
    question = TaskQuestion("od")
    assert Row(one, question).key != Row(other, question).key
    keys = [Row(pipe, question).key for pipe in pipes]
    assert keys[0] == keys[2] != keys[1]
    details = {Row(one, CascadeQuestion(detail)).key for detail in ("short", "detailed")}
    assert len(details) == 2
    assert row_key(json.loads(json.dumps(Row(one, question, error="e").to_dict()))) == Row(one, question).key


def test_the_head_of_a_row() -> None:
    source = Source("a.jpg", Path("/x/a.jpg"), "a")
    head = {"image": "a.jpg", "place": "/x/a.jpg"}
    questions: dict[Question, dict[str, Any]] = {
        TaskQuestion("od"): {"task": "<OD>"},
        TaskQuestion("Where?"): {"task": "Where?"},
        TaskQuestion("<REGION_TO_OCR>", (1, 2, 3, 4)): {"task": "<REGION_TO_OCR>", "input": (1, 2, 3, 4)},
        CascadeQuestion(): {"task": "cascade", "detail": "short"},
    }
    for question, asked in questions.items():
        assert Row(source, question, error="e").to_dict() == {**head, **asked, "error": "e"}
    assert [question.alias for question in questions] == ["od", "prompt", "region_to_ocr", "cascade"]


def parsed(task: str, kind: Any, text: str, finish_reason: str = "stop") -> Answer:
    return parse_answer(task, kind, text, (200, 100), finish_reason=finish_reason)


BOX = "<loc_100><loc_200><loc_700><loc_800>"
RESULTS: dict[str, Result] = {
    "text": parsed("<CAPTION>", "text", "a cup"),
    "boxes": parsed("<OD>", "boxes", f"a cup{BOX}", "length"),
    "quads": parsed("<OCR_WITH_REGION>", "quads", f"STOP{BOX}{BOX}"),
    "polygons": parsed("<REFERRING_EXPRESSION_SEGMENTATION>", "polygons", f"{BOX}<loc_5><loc_9>"),
}
RESULTS["confident"] = replace(
    RESULTS["boxes"],  # type: ignore[type-var]
    boxes=(Box((1.0, 2.0, 90.0, 80.0), "cup", confidence=0.25),),
)
RESULTS["cascade"] = Cascade.join(
    RESULTS["text"],  # type: ignore[arg-type]
    RESULTS["boxes"],  # type: ignore[arg-type]
    [RESULTS["polygons"]],  # type: ignore[list-item]
    ["It is too long."],
)


def stored(result: Result) -> dict[str, Any]:
    row = Row(Source("a.jpg", Path("/x/a.jpg"), "a"), TaskQuestion("od"), result, version=(7, 1000, 12))
    values: dict[str, Any] = json.loads(json.dumps(row.to_dict(file=True)))
    return values


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_a_stored_result_is_drawn_like_a_new_one(result: Result) -> None:
    image = Image.new("RGB", (200, 100))
    restored = restore_result(stored(result))
    assert restored.to_dict() == result.to_dict() and restored.draw(image).tobytes() == result.draw(image).tobytes()
    assert is_cut_off(stored(result)) == result.is_cut_off


@pytest.mark.parametrize(
    "damage",
    [
        {"boxes": [{"xyxy": [1, 2, 3], "label": ""}]},
        {"boxes": [{"xyxy": [1, 2, 3, "4"], "label": ""}]},
        {"boxes": [{"xyxy": [1, 2, 3, float("nan")], "label": ""}]},
        {"boxes": [{"xyxy": [1, 2, 3, 1e300], "label": ""}]},
        {"boxes": [{"xyxy": [1, 2, 3, 4]}]},
        {"boxes": [{"xyxy": [1, 2, 3, 4], "label": "", "confidence": float("nan")}]},
        {"boxes": 7},
        {"polygons": [{"rings": [[1, 2, 3]], "label": ""}]},
        {"image_size": [3]},
        {"image_size": None},
        {"caption": "a cup"},
    ],
)
def test_a_damaged_result_is_not_restored(damage: dict[str, Any]) -> None:
    with pytest.raises((AttributeError, LookupError, TypeError, ValueError)):
        restore_result(stored(RESULTS["boxes"]) | damage)


def test_an_image_has_changed_when_its_size_or_time_has(tmp_path: Path) -> None:
    """Where that is unknown, the answer stays: a row of an older version, an image that is gone, or its bytes."""
    path = tmp_path / "a.png"
    path.write_bytes(b"1234")
    source = Source("a.png", path, "a")
    row = Row(source, TaskQuestion("od"), RESULTS["text"], version=source.version())
    values = json.loads(json.dumps(row.to_dict(file=True)))
    path.write_bytes(b"12345")
    other = source.version()
    assert has_changed(values, source) and other is not None
    values["file"] = {"bytes": 5, "modified_ns": other[2]}
    assert not has_changed(values, source)
    values["file"]["modified_ns"] -= 1
    assert has_changed(values, source)
    assert not any(has_changed({**values, "file": file}, source) for file in (None, 7))
    path.unlink()
    assert not has_changed(values, source) and not has_changed(values, Source("-", b"12345", "stdin"))
    assert "file" not in row.to_dict()
