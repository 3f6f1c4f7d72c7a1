"""One question about one image, and the row that its result becomes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from florence2.answers.answer import Answer
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
    known: Task | None = field(default=None, repr=False, compare=False)

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

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the image, its place, the question, then the answer's fields or the error."""
        drawn = {"drawing": self.drawing, "drawing_error": self.drawing_error}
        values = self._head() | (self.answer.to_dict() if self.answer else {"error": self.error})
        return values | {key: value for key, value in drawn.items() if value is not None}

    def _head(self) -> dict[str, Any]:
        return {"image": self.source.name, "place": self.source.place, **self.question.to_dict()}


def row_key(row: Mapping[str, Any]) -> RowKey:
    """Return the key of a row in the form of `Row.to_dict`."""
    return tuple(json.dumps(row.get(part)) for part in ("place", "task", "input", "detail"))
