"""What makes two rows the same work, and what a row says."""

import json
from pathlib import Path
from typing import Any

from florence2.bulk.rows import Question, Row, TaskQuestion, row_key
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
