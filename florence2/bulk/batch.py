"""Many pictures, one or more questions each: rows come as they are known, and errors stay with their picture."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from florence2.answers.answer import Answer
from florence2.answers.cascade import Cascade
from florence2.errors import Florence2Error, ImageError
from florence2.generation.options import GenerationOptions
from florence2.inputs.image import image_suffixes
from florence2.inputs.processor import TaskText
from florence2.inputs.tasks import find_task
from florence2.pipeline import Detail, EncodedImage, Florence2, PreparedImage, Request

CASCADE = "cascade"
"""The question that is a chain of tasks."""
RowKey: TypeAlias = tuple[str, ...]
"""What makes two rows the same work: the picture's place, task, input and detail."""

MAX_STDIN_BYTES = 256 << 20


@dataclass(frozen=True)
class Source:
    """One picture: the name it is reported under, where it is or its bytes, and the name of files made from it."""

    name: str
    data: Path | bytes
    stem: str

    @property
    def place(self) -> str:
        """What tells it from every other picture: its whole path, or the hash of its bytes."""
        if isinstance(self.data, bytes):
            return f"sha256:{hashlib.sha256(self.data).hexdigest()}"
        return str(self.data.absolute())


@dataclass(frozen=True)
class Question:
    """A task with its input, or (task "cascade") the chain of caption, grounding and outlines."""

    task: str
    text: TaskText = None
    detail: Detail = "short"

    @property
    def name(self) -> str:
        """How rows name the task: its token, or the prompt itself."""
        found = find_task(self.task)
        return found.token if found else self.task

    @property
    def alias(self) -> str:
        """The task as a part of a file's name."""
        found = find_task(self.task)
        return found.alias if found else "cascade" if self.task == CASCADE else "prompt"


@dataclass(frozen=True)
class Row:
    """The result for one picture and one question: an answer, or the sentence that says why there is none."""

    source: Source
    question: Question
    answer: Answer | Cascade | None = None
    error: str | None = None

    @property
    def key(self) -> RowKey:
        """See `row_key`."""
        return row_key(self._head())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: picture, its place, task and input, then the answer's fields or the error."""
        return self._head() | (self.answer.to_dict() if self.answer else {"error": self.error})

    def _head(self) -> dict[str, Any]:
        head: dict[str, Any] = {"image": self.source.name, "place": self.source.place, "task": self.question.name}
        if self.question.text is not None:
            head["input"] = self.question.text
        if self.question.task == CASCADE:
            head["detail"] = self.question.detail
        return head


def find_pictures(arguments: Sequence[str]) -> list[Source]:
    """Command line arguments -> pictures: files as they are, folders with all that is in and below them, "-" as stdin.

    In folders, files with a picture's ending count, in alphabetical order. A file that does not exist is still a
    source; its row will say so. Raises ImageError when a folder holds no picture.
    """
    sources: list[Source] = []
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            sources.append(Source("-", _read_stdin(), "stdin"))
        elif path.is_dir():
            suffixes = image_suffixes()
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            if not inside:
                raise ImageError(f"The folder {argument} holds no picture: no file ending in {_some(suffixes)}.")
            sources += [Source(str(file), file, str(file.relative_to(path).with_suffix(""))) for file in inside]
        else:
            sources.append(Source(argument, path, path.stem))
    return _with_distinct_stems(sources)


def answer_pictures(
    model: Florence2,
    sources: Sequence[Source],
    questions: Sequence[Question],
    options: GenerationOptions,
    batch_size: int,
    done: frozenset[RowKey] = frozenset(),
) -> Iterator[Row]:
    """Rows for every picture and question whose key `done` does not hold, `batch_size` pictures at once.

    A picture is encoded once for all its questions, and read while the pictures before it are being answered. What is
    wrong with one picture costs only its own rows.
    """
    left = {source: [question for question in questions if Row(source, question).key not in done] for source in sources}
    waiting = [source for source in sources if left[source]]
    batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
    with ThreadPoolExecutor(1) as reader:
        reading = [reader.submit(_prepare, model, batch) for batch in batches[:1]]
        for i, batch in enumerate(batches):
            prepared = reading.pop().result()
            reading = [reader.submit(_prepare, model, following) for following in batches[i + 1 : i + 2]]
            encoded = _encode(model, prepared)
            work = [_Work(source, question, encoded[source]) for source in batch for question in left[source]]
            yield from _answer_together(model, work, options)


@dataclass(frozen=True)
class _Work:
    """One row to come; `encoded` is the picture, or the sentence that says why there is none."""

    source: Source
    question: Question
    encoded: EncodedImage | str


def _prepare(model: Florence2, sources: Sequence[Source]) -> dict[Source, PreparedImage | str]:
    """Every picture read, or the sentence that says why it cannot be."""

    def prepare(source: Source) -> PreparedImage | str:
        try:
            return model.prepare_image(source.data)
        except Florence2Error as error:
            return str(error)

    return {source: prepare(source) for source in sources}


def _encode(model: Florence2, prepared: Mapping[Source, PreparedImage | str]) -> dict[Source, EncodedImage | str]:
    """Every picture that could be read, encoded."""
    good = {source: image for source, image in prepared.items() if isinstance(image, PreparedImage)}
    try:
        found = dict(zip(good, model.encode_images(list(good.values())), strict=True))
    except Florence2Error as error:  # of the checkpoint's picture size, and so the same for all
        return {source: str(error) for source in prepared}
    return {source: image if isinstance(image, str) else found[source] for source, image in prepared.items()}


def _answer_together(model: Florence2, work: Sequence[_Work], options: GenerationOptions) -> Iterator[Row]:
    """All plain tasks as one batch; when that is refused, one by one, so that only the culprit fails."""
    plain = [w for w in work if isinstance(w.encoded, EncodedImage) and w.question.task != CASCADE]
    requests: list[Request] = [(w.question.task, w.encoded, w.question.text) for w in plain]
    answers: dict[int, Answer] = {}
    try:
        found = model.run_batch(requests, options=options, batch_size=max(1, len(requests)))
        answers = {id(w): answer for w, answer in zip(plain, found, strict=True)}
    except Florence2Error:
        pass  # found out below whose fault it was
    for w in work:
        if isinstance(w.encoded, EncodedImage):
            yield _answer_one(model, w, w.encoded, options, answers.get(id(w)))
        else:
            yield Row(w.source, w.question, error=w.encoded)


def _answer_one(
    model: Florence2, work: _Work, encoded: EncodedImage, options: GenerationOptions, answer: Answer | None
) -> Row:
    question = work.question
    try:
        if question.task == CASCADE:
            return Row(work.source, question, model.cascade(encoded, question.detail, options=options))
        return Row(work.source, question, answer or model.run(question.task, encoded, question.text, options=options))
    except Florence2Error as error:
        return Row(work.source, question, error=str(error))


def row_key(row: dict[str, Any]) -> RowKey:
    """The key of a row in the form of `Row.to_dict`."""
    return tuple(json.dumps(row.get(part)) for part in ("place", "task", "input", "detail"))


def _read_stdin() -> bytes:
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise ImageError(f"The picture on stdin has more than {MAX_STDIN_BYTES >> 20} MiB.")
    return data


def _some(suffixes: Iterable[str]) -> str:
    usual = [suffix for suffix in (".jpg", ".png", ".webp", ".tif") if suffix in suffixes]
    return ", ".join(usual) + " or another format that Pillow reads"


def _with_distinct_stems(sources: Iterable[Source]) -> list[Source]:
    """Where two pictures would give files of the same name, number the later ones."""
    taken: set[str] = set()
    distinct = []
    for source in sources:
        stem, number = source.stem, 1
        while stem in taken:
            number += 1
            stem = f"{source.stem}-{number}"
        taken.add(stem)
        distinct.append(replace(source, stem=stem))
    return distinct
