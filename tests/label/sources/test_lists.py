"""List files and JSON Lines: the images and questions in them, and lines that are wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from florence2.inputs.tasks import TaskTable, token_task
from florence2.label.sources import lists
from florence2.label.sources.item import Item
from florence2.label.sources.opening import open_sources

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the lines of a list: texts, bytes, or values as JSON."""

    def write(name: str, *lines: object) -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines if not isinstance(line, bytes)]
        encoded = iter(text.encode() for text in texts)
        data = b"\n".join(line if isinstance(line, bytes) else next(encoded) for line in lines)
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def items(path: Path, **options) -> list[Item]:
    return list(open_sources([str(path)], **options))


def asked(item: Item) -> list[tuple[str, object]]:
    return [(question.name, question.text) for question in item.questions]


# ---- list files ----------------------------------------------------------------------------------------------------


def test_a_path_a_line_relative_to_the_list(write: Write, tmp_path: Path) -> None:
    path = write(
        "list.txt", b"\xef\xbb\xbfa b.png\r", "", "deep/c.jpg", f"{tmp_path}/d.png", "../e.png", "/f.png", "  "
    )
    found = items(path)
    assert [item.source.id for item in found] == [
        "a b.png",
        "deep/c.jpg",
        "d.png",
        f"{tmp_path.parent}/e.png",
        "/f.png",
    ]
    assert found[0].source.data == tmp_path / "a b.png" and found[0].source.stem == "a b"
    assert all(item.questions is None and item.error is None for item in found)


def test_a_wrong_line_is_one_error(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "MAX_LINE_BYTES", 100)
    long = "x" * 100
    path = write("list.txt", "https://x/a.png", long, "x" * 1000, "x" * 101, b"\xff\xfea\0.\0p\0", "b.png", "x" * 5000)
    found = items(path)
    assert [item.error is None for item in found] == [False, True, False, False, False, True, False]
    assert found[0].error.startswith(f"{path} line 1: https://x/a.png is a URL, which is not fetched here")
    assert found[0].source.id == f"{path} line 1" and found[0].source.place == f"{path}::line 1"
    assert found[2].error == f"{path} line 3: The line has more than 100 bytes."
    assert "save the list as UTF-8" in found[4].error and found[6].source.id == f"{path} line 7"
    assert [item.source.id for item in found if item.error is None] == [long, "b.png"]


def test_an_image_that_is_listed_twice_stays_twice(write: Write) -> None:
    path = write("list.txt", "a.png", "b.png", "a.png")
    assert [item.source.id for item in items(path)] == ["a.png", "b.png", "a.png-2"]
    parts = [[item.source.id for item in items(path, shard=(part, 2))] for part in (1, 2)]
    assert parts == [["a.png", "a.png-2"], ["b.png"]]


def test_a_list_that_becomes_unreadable_ends_with_an_error(write: Write) -> None:
    path = write("list.txt", "a.png")
    sources = open_sources([str(path)])
    path.unlink()
    (item,) = sources
    assert item.error == f"{path} cannot be read: No such file or directory."


# ---- JSON Lines ----------------------------------------------------------------------------------------------------


def test_a_question_a_line(write: Write, tmp_path: Path) -> None:
    path = write(
        "q.jsonl",
        {"image": "a.png", "task": "od"},
        {"image": "a.png", "task": "<VQA>", "text": "how many?"},
        {"image": "a.png", "task": "<OD>"},  # asked twice, answered once
        {"image": "b.png", "task": "region_to_ocr", "box": [1, 2.5, 30, 40], "id": 7, "comment": {"by": "us"}},
        {"image": "b.png", "task": "caption", "id": "8"},
        {"image": "b.png"},
        {"image": "a.png", "task": "caption_to_phrase_grounding", "text": ["a dog", "a cat"]},
    )
    known = TaskTable([token_task("<VQA>")])
    found = items(path, known=known)
    assert [item.source.id for item in found] == ["a.png", "7", "8", "b.png", "a.png"]
    assert asked(found[0]) == [("<OD>", None), ("<VQA>", "how many?")]
    assert asked(found[1]) == [("<REGION_TO_OCR>", (1.0, 2.5, 30.0, 40.0))] and asked(found[2]) == [("<CAPTION>", None)]
    assert found[3].questions is None
    assert asked(found[4]) == [("<CAPTION_TO_PHRASE_GROUNDING>", ["a dog", "a cat"])]
    assert found[0].source.data == tmp_path / "a.png" and items(path, known=known) == found


def test_questions_that_repeat_later_get_another_id(write: Write) -> None:
    lines = [{"image": name, "task": task} for name, task in (("a", "od"), ("b", "od"), ("a", "caption"), ("a.", "od"))]
    path = write("q.jsonl", *lines, lines[0])
    assert [item.source.id for item in items(path)] == ["a", "b", "a", "a.", "a-2"]


def test_many_questions_about_one_image_are_several_items(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "MAX_QUESTIONS", 2)
    path = write("q.jsonl", *({"image": "a", "task": task} for task in ("od", "ocr", "caption")))
    assert [len(item.questions) for item in items(path)] == [2, 1]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", r"The line is \[\], not an object"),
        ("null", "not an object"),
        (b'{"image": "\xff"}', "is not JSON"),
        ({}, '"image" must be the path of an image, not None'),
        ({"image": 3}, "not 3"),
        ({"image": ""}, "name is empty"),
        ({"image": "s3://x/a.png"}, "is a URL"),
        ({"image": "a\0"}, "holds a NUL"),
        ({"image": "a", "task": 5}, '"task" must be a task or a prompt, not 5'),
        ({"image": "a", "task": "<X>"}, "Unknown task"),
        ({"image": "a", "task": ""}, "must be a token"),
        ({"image": "a", "task": "od", "text": "x"}, 'takes no "text"'),
        ({"image": "a", "task": "od", "box": [1, 2, 3, 4]}, 'takes no "box"'),
        ({"image": "a", "text": "x"}, "has text but no task"),
        ({"image": "a", "box": [1, 2, 3, 4]}, "has box but no task"),
        ({"image": "a", "task": "region_to_ocr"}, "needs a region"),
        ({"image": "a", "task": "caption_to_phrase_grounding", "text": 5}, '"text" must be a string or a list'),
        ({"image": "a", "task": "region_to_ocr", "box": [1, 2, 3]}, '"box" must be four numbers'),
        ({"image": "a", "task": "region_to_ocr", "box": [1, 2, 3, True]}, '"box" must be four numbers'),
        ('{"image": "a", "task": "region_to_ocr", "box": [1, 2, 3, %s]}' % ("9" * 400), '"box" must be four'),
        ('{"image": "a", "task": "region_to_ocr", "box": [1, 2, 3, %s]}' % ("9" * 5000), "is not JSON"),
        ('{"image": "a", "task": "region_to_ocr", "box": [1, 2, 3, NaN]}', '"box" must be four numbers'),
        ({"image": "a", "id": 1.5}, '"id" must be a text or a whole number'),
        ({"image": "a", "id": ""}, '"id" must be a text'),
        ({"image": "a", "id": True}, "not True"),
        ('{"image": "a", "id": %s}' % ("9" * 400), "at most 64 bits"),
    ],
)
def test_a_wrong_question_is_one_error(write: Write, line: object, sentence: str) -> None:
    path = write("q.jsonl", {"image": "a", "task": "od"}, line, {"image": "a", "task": "od", "id": "x"})
    first, wrong, last = items(path)
    assert first.error is last.error is None and wrong.source.place == f"{path}::line 2"
    assert wrong.error.startswith(f"{path} line 2: ") and len(wrong.error) < 1000
    assert re.search(sentence, wrong.error), wrong.error
