"""List files, a path a line, and JSON Lines, a question a line. Both are read one line after another."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from florence2.bulk.questions import read_questions
from florence2.bulk.rows import TaskQuestion
from florence2.bulk.sources import Source
from florence2.errors import Florence2Error, ImageError, PromptError, shown
from florence2.inputs.files import url_problem
from florence2.inputs.tasks import Task
from florence2.label.sources.item import Item, error_item, file_id, file_item

MAX_LINE_BYTES = 1 << 20
MAX_QUESTIONS = 1000
"""The most lines about one image that are answered together; further ones begin a second item."""
_SAMPLE = '{"image": "a.jpg", "task": "od", "id": "a"}'


def read_list(path: Path, root: str) -> Iterator[Item]:
    """Yield the images of a list file: a path a line, relative to the file's folder. Empty lines are passed over."""
    for number, line in _lines(path):
        yield _read_path(path, number, line, root)


def read_json_lines(path: Path, root: str, known: Mapping[str, Task]) -> Iterator[Item]:
    """Yield the images of JSON Lines with their questions.

    A line is an object with "image", a path relative to the file's folder, and as needed "task", "text" (a string or
    a list of strings), "box" (x1, y1, x2, y2 in pixels) and "id"; others are passed over. Lines about the same image
    with the same id that follow each other become one item; a line without a task is an item of its own.
    """
    waiting: Item | None = None
    for number, line in _lines(path):
        try:
            item = _read_question(path, line, root, known)
        except Florence2Error as error:
            item = _line_error(path, number, error)
        if waiting is not None and (joined := _join(waiting, item)) is not None:
            waiting = joined
            continue
        if waiting is not None:
            yield waiting
        waiting = item
    if waiting is not None:
        yield waiting


def _read_path(path: Path, number: int, line: bytes | None, root: str) -> Item:
    try:
        return Item(_source(path, os.fsdecode(_text(line)), root))
    except Florence2Error as error:
        return _line_error(path, number, error)


def _join(first: Item, second: Item) -> Item | None:
    """Return one item with the questions of both, or None if they are about different images or are too many."""
    if first.questions is None or second.questions is None or first.source != second.source:
        return None
    asked = [question.to_dict() for question in first.questions]
    further = (question for question in second.questions if question.to_dict() not in asked)
    questions = (*first.questions, *further)
    return Item(first.source, questions) if len(questions) <= MAX_QUESTIONS else None


def _read_question(path: Path, line: bytes | None, root: str, known: Mapping[str, Task]) -> Item:
    """Return the item of one line. Raises a Florence2Error."""
    values = _parse(_text(line))
    name = values.get("image")
    if not isinstance(name, str):
        raise ImageError(f'"image" must be the path of an image, not {shown(name)}.')
    source = _source(path, name, root, _id(values.get("id")))
    task, texts, box = values.get("task"), _texts(values.get("text")), _box(values.get("box"))
    if task is None and (texts or box):
        raise PromptError(f'The line has {"text" if texts else "box"} but no task; add "task".')
    if task is None:
        return Item(source)
    if not isinstance(task, str):
        raise PromptError(f'"task" must be a task or a prompt, not {shown(task)}.')
    return Item(source, tuple(_ask(task, texts, box, known)))


def _ask(
    task: str, texts: list[str] | None, box: tuple[float, ...] | None, known: Mapping[str, Task]
) -> list[TaskQuestion]:
    try:
        return read_questions([task], texts, None if box is None else [box], known)
    except PromptError as error:
        raise PromptError(str(error).replace("--text", '"text"').replace("--box", '"box"')) from None


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ImageError(f"The line is not JSON ({reason}); write one object a line, such as {_SAMPLE}.") from None
    if not isinstance(values, dict):
        raise ImageError(f"The line is {shown(values)}, not an object; write one a line, such as {_SAMPLE}.")
    return values


def _id(value: object) -> str | None:
    """Return an id as text. Raises ImageError."""
    if value is None or (isinstance(value, str) and value):
        return value
    if type(value) is int and abs(value) < 1 << 63:
        return str(value)
    raise ImageError(f'"id" must be a text or a whole number of at most 64 bits, not {shown(value)}.')


def _texts(value: object) -> list[str] | None:
    if value is None:
        return None
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise PromptError(f'"text" must be a string or a list of strings, not {shown(value)}.')
    return [str(text) for text in texts]


def _box(value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_coordinate, value)):
        raise PromptError(f'"box" must be four numbers, x1, y1, x2 and y2 in pixels, not {shown(value)}.')
    return tuple(map(float, value))


def _is_coordinate(value: object) -> bool:
    # a whole number of 400 digits is not a float, and NaN is not less than anything
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.ldexp(1, 53)


def _source(path: Path, name: str, root: str, id: str | None = None) -> Source:
    """Return the image that a line names. Raises ImageError for what cannot be a path."""
    if problem := url_problem(name):
        raise ImageError(problem)
    if "\0" in name:
        raise ImageError(f"{shown(name)} is not a path: it holds a NUL; save the list as UTF-8.")
    file = path.parent / name
    return file_item(file, file_id(str(file), root) if id is None else id).source


def _line_error(path: Path, number: int, error: Florence2Error) -> Item:
    name = f"{path} line {number}"
    return error_item(name, f"{path.absolute()}::line {number}", f"{name}: {error}")


def _text(line: bytes | None) -> bytes:
    if line is None:
        raise ImageError(f"The line has more than {MAX_LINE_BYTES:,} bytes.")
    return line


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines that are not empty, with their numbers from 1; None for one that is too long. Raises OSError."""
    number, size = 0, MAX_LINE_BYTES + 1  # with its newline
    with path.open("rb") as file:
        while line := file.readline(size):
            number += 1
            whole = line.endswith(b"\n") or len(line) < size
            while line and not line.endswith(b"\n") and len(line) == size:
                line = file.readline(size)
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            text = text.rstrip(b"\r\n")
            if not whole or text.strip():
                yield number, text if whole else None
