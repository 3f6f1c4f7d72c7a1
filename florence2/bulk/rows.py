"""One question about one image, and the row that its result becomes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from florence2.answers.answer import Answer, Box, Polygon, Quad
from florence2.answers.cascade import Cascade
from florence2.bulk.sources import FileVersion, Source
from florence2.inputs.processor import TaskText
from florence2.inputs.tasks import Task, find_task

Result: TypeAlias = Answer | Cascade
RowKey: TypeAlias = tuple[str, ...]
"""Two rows with the same key are the same work: the same place of the image, task, input and detail."""


class Question(Protocol):
    """A question that can be asked about every image."""

    @property
    def name(self) -> str:
        """The task as rows name it."""
        ...

    @property
    def alias(self) -> str:
        """The task as a part of file names."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the part of a row that says what was asked: "task", and "input" or "detail"."""
        ...


@dataclass(frozen=True)
class TaskQuestion:
    """A task, or a free prompt, with its input.

    `known` is the task that `task` names; None looks it up among those of every model.
    """

    task: str
    text: TaskText = None
    known: Task | None = None

    @property
    def name(self) -> str:
        """The task's token, or the prompt itself."""
        known = self.known or find_task(self.task)
        return known.token if known else self.task

    @property
    def alias(self) -> str:
        """The task's alias, or "prompt"."""
        known = self.known or find_task(self.task)
        return known.alias if known else "prompt"

    def to_dict(self) -> dict[str, Any]:
        """Return "task", and "input" if the task has one."""
        return {"task": self.name} | ({} if self.text is None else {"input": self.text})


@dataclass(frozen=True)
class Row:
    """The result of one question about one image: an answer, or an error message.

    `version` is that of the image's file when it was read. `drawing` is the path of the drawn answer inside its folder,
    `drawing_error` why it could not be drawn.
    """

    source: Source
    question: Question
    answer: Result | None = None
    error: str | None = None
    version: FileVersion | None = None
    drawing: str | None = None
    drawing_error: str | None = None

    @property
    def key(self) -> RowKey:
        """The key of the row, known before its result is (see `row_key`)."""
        return row_key(self._head())

    def to_dict(self, file: bool = False) -> dict[str, Any]:
        """Return plain JSON values: the image, its place, the question, then the answer's fields or the error.

        `file` adds the size and time of the image's file, by which a later run sees that the image has changed.
        """
        drawn = {"drawing": self.drawing, "drawing_error": self.drawing_error}
        values = self._head() | (self.answer.to_dict() if self.answer else {"error": self.error})
        values |= {"file": _file_values(self.version)} if file and self.version is not None else {}
        return values | {key: value for key, value in drawn.items() if value is not None}

    def _head(self) -> dict[str, Any]:
        names = {"image": self.source.name, "place": self.source.place, "id": self.source.id}
        return {name: value for name, value in names.items() if value is not None} | self.question.to_dict()


def row_key(row: Mapping[str, Any]) -> RowKey:
    """Return the key of a row in the form of `Row.to_dict`."""
    return tuple(json.dumps(row.get(part)) for part in ("place", "task", "input", "detail"))


def has_changed(row: Mapping[str, Any], source: Source) -> bool:
    """Return whether an image's file is another than the one that a stored row answers; False where that is unknown."""
    stored, version = row.get("file"), source.version()
    return isinstance(stored, dict) and version is not None and stored != _file_values(version)


def _file_values(version: FileVersion) -> dict[str, int]:
    _, size, modified = version  # a file system that is mounted again may number its files otherwise
    return {"bytes": size, "modified_ns": modified}


def is_cut_off(row: Mapping[str, Any]) -> bool:
    """Return whether the token limit ended the answer that a stored row holds, or any part of it."""
    return any(part.get("finish_reason") == "length" for part in _answers(row))


def count_left_out(row: Mapping[str, Any]) -> int:
    """Return how many regions were left out of the answer that a stored row holds, because of their confidence."""
    counts = [part.get("left_out") for part in _answers(row)]
    return sum(count for count in counts if type(count) is int and count > 0)


def _answers(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a stored answer, and those that it consists of."""
    segments = row.get("segments")
    parts = (row, row.get("caption"), row.get("grounding"), *(segments if isinstance(segments, list) else ()))
    return [part for part in parts if isinstance(part, dict)]


def restore_result(row: Mapping[str, Any]) -> Result:
    """Return the result that a stored row holds, as far as it can be drawn: without alternatives.

    Raises KeyError, TypeError or ValueError for values that are not those of `Row.to_dict`.
    """
    if "caption" not in row:
        return _restore_answer(row)
    segments = tuple(map(_restore_answer, row["segments"]))
    caption, grounding = _restore_answer(row["caption"]), _restore_answer(row["grounding"])
    return Cascade(caption, grounding, segments, tuple(row.get("missing", ())))


def _restore_answer(values: Mapping[str, Any]) -> Answer:
    width, height = values["image_size"]

    def points(numbers: Sequence[float], count: int | None = None) -> Any:
        if len(numbers) % 2 or (count or len(numbers)) != len(numbers):
            raise ValueError(f"{len(numbers)} coordinates are not those of a region.")
        if not all(0 <= number <= max(width, height) for number in numbers):  # false for NaN too
            raise ValueError("A coordinate is outside the image.")
        return tuple(numbers)

    def rings(polygon: Mapping[str, Any]) -> tuple[tuple[float, ...], ...]:
        return tuple(points(ring) for ring in polygon["rings"])

    def words(shape: Mapping[str, Any]) -> tuple[str, None, float | None]:
        confidence = shape.get("confidence")
        if confidence is not None and not 0 <= confidence <= 1:
            raise ValueError("A confidence is not between 0 and 1.")
        return str(shape["label"]), None, confidence

    regions: dict[str, Any] = {
        "boxes": tuple(Box(points(box["xyxy"], 4), *words(box)) for box in values.get("boxes", ())),
        "quads": tuple(Quad(points(quad["xyxyxyxy"], 8), *words(quad)) for quad in values.get("quads", ())),
        "polygons": tuple(Polygon(rings(each), *words(each)) for each in values.get("polygons", ())),
    }
    head = {name: values[name] for name in ("task", "kind", "text", "raw_text")}
    return Answer(**head, image_size=(width, height), finish_reason=values.get("finish_reason"), **regions)
