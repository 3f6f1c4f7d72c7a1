"""Many pictures, one or more questions each: errors stay with their picture, and stopped work goes on.

Rows are written as soon as they are known, to a JSON Lines file that also says, next time, what is done already.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeAlias

from florence2.answers import Answer
from florence2.decoding import GenerationOptions
from florence2.errors import Florence2Error, ImageError
from florence2.image import ImageInput, picture_suffixes
from florence2.pipeline import Cascade, Detail, EncodedImage, Florence2, Request
from florence2.processor import TaskText
from florence2.tasks import find_task
from florence2.tensors import temporary_beside

CASCADE = "cascade"
"""The question that is a chain of tasks."""
RowKey: TypeAlias = tuple[str, str, str]
"""What makes two rows the same work: picture, task and input."""

MAX_STDIN_BYTES = 256 << 20
_PROGRESS_SECONDS = 10.0  # between progress lines where they cannot overwrite each other


@dataclass(frozen=True)
class Source:
    """One picture: the name it is reported under, where it is, and the name of files made from it."""

    name: str
    data: Path | bytes
    stem: str

    @property
    def image(self) -> ImageInput:
        """What `open_image` takes."""
        return self.data


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
    def suffix(self) -> str:
        """How names of drawn files end."""
        found = find_task(self.task)
        return found.alias if found else "cascade" if self.task == CASCADE else "prompt"


@dataclass(frozen=True)
class Row:
    """The result for one picture and one question: an answer, or the sentence that says why there is none."""

    source: Source
    question: Question
    answer: Answer | Cascade | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: picture, task and input, then the answer's fields or the error."""
        row: dict[str, Any] = {"image": self.source.name, "task": self.question.name}
        if self.question.text is not None:
            row["input"] = self.question.text
        return row | (self.answer.to_dict() if self.answer else {"error": self.error})


class Sink(Protocol):
    """Where rows go."""

    def __call__(self, row: Row) -> None:
        """Take one row, at once and for good."""
        ...


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
            suffixes = picture_suffixes()
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            if not inside:
                raise ImageError(f"The folder {argument} holds no pictures.")
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
    """Rows for every picture and question that `done` (see `row_key`) does not hold, `batch_size` pictures at once.

    A picture is encoded once for all its questions. What is wrong with one picture costs only its own rows.
    """
    for start in range(0, len(sources), batch_size):
        work = []
        for source in sources[start : start + batch_size]:
            left = [question for question in questions if row_key(Row(source, question).to_dict()) not in done]
            encoded = _encode(model, source) if left else None
            work += [_Work(source, question, encoded) for question in left]
        yield from _answer_together(model, work, options)


@dataclass(frozen=True)
class _Work:
    """One row to come; `encoded` is the picture, or the sentence that says why there is none."""

    source: Source
    question: Question
    encoded: EncodedImage | str | None


def _encode(model: Florence2, source: Source) -> EncodedImage | str:
    try:
        return model.encode_image(source.image)
    except Florence2Error as error:
        return str(error)


def _answer_together(model: Florence2, work: Sequence[_Work], options: GenerationOptions) -> Iterator[Row]:
    """All plain tasks as one batch; when that is refused, one by one, so that only the culprit fails."""
    plain = [w for w in work if isinstance(w.encoded, EncodedImage) and w.question.task != CASCADE]
    requests: list[Request] = [(w.question.task, w.encoded, w.question.text) for w in plain]  # type: ignore[misc]
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
    return (str(row.get("image")), str(row.get("task")), json.dumps(row.get("input")))


class Folder:
    """An output folder: `results.jsonl`, and drawn pictures beside it when `draw` is set."""

    def __init__(self, path: Path, draw: bool):
        """Open the folder. `done` then holds what an earlier run finished; its failures are to be tried again."""
        self.path, self.draw = path, draw
        self.path.mkdir(parents=True, exist_ok=True)
        results = self.path / "results.jsonl"
        self.done = _keep_finished(results) if results.exists() else frozenset()
        self.file = results.open("a", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __call__(self, row: Row) -> None:
        if self.draw and row.answer is not None and _has_regions(row.answer):
            target = self.path / f"{row.source.stem}.{row.question.suffix}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary_beside(target) as draft:
                row.answer.draw(row.source.image).save(draft, format="PNG")
        self.file.write(json.dumps(row.to_dict(), ensure_ascii=False) + "\n")
        self.file.flush()


class Console:
    """Rows on stdout, as text for people or JSON Lines for programs; failures as text on stderr."""

    def __init__(self, as_json: bool, headings: bool):
        self.as_json, self.headings = as_json, headings

    def __call__(self, row: Row) -> None:
        if self.as_json:
            print(json.dumps(row.to_dict(), ensure_ascii=False), flush=True)
        elif row.error is not None:
            name = "" if row.source.name in row.error else f"{row.source.name}: "
            print(f"florence2: {name}{row.error}", file=sys.stderr)
        else:
            if self.headings:
                print(f"== {row.source.name}  {row.question.name}")
            print(row.answer, flush=True)


class Progress:
    """Pictures done, seconds each, and time left, on stderr; silent for a single picture."""

    def __init__(self, total: int, stream: TextIO | None = None):
        self.total, self.stream = total, stream or sys.stderr
        self.began = self.told = time.monotonic()
        self.on_terminal = self.stream.isatty()

    def show(self, finished: int) -> None:
        """Tell how far the work is."""
        now = time.monotonic()
        if self.total < 2 or not (self.on_terminal or now - self.told > _PROGRESS_SECONDS):
            return
        self.told = now
        each = (now - self.began) / max(1, finished)
        line = f"{finished}/{self.total} pictures, {each:.2f} s each, {_clock(each * (self.total - finished))} left"
        print(f"\r{line}\x1b[K" if self.on_terminal else line, end="" if self.on_terminal else "\n", file=self.stream)
        self.stream.flush()

    def close(self) -> None:
        """Leave the line."""
        if self.on_terminal and self.total > 1:
            print(file=self.stream)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _keep_finished(results: Path) -> frozenset[RowKey]:
    """Rewrite an earlier `results.jsonl` without failures and half-written lines; return the keys of the rest."""
    keys = set()
    with (
        results.open(encoding="utf-8", errors="replace") as old,
        temporary_beside(results) as draft,
        draft.open("w", encoding="utf-8") as new,
    ):
        for line in old:
            row = _parse_row(line)
            if row is not None and "error" not in row:
                keys.add(row_key(row))
                new.write(line if line.endswith("\n") else line + "\n")
    return frozenset(keys)


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _has_regions(answer: Answer | Cascade) -> bool:
    found = answer.grounding if isinstance(answer, Cascade) else answer
    return bool(found.boxes or found.quads or found.polygons)


def _read_stdin() -> bytes:
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise ImageError(f"The picture on stdin has more than {MAX_STDIN_BYTES >> 20} MiB.")
    return data


def _with_distinct_stems(sources: Iterable[Source]) -> list[Source]:
    """Where two pictures would give files of the same name, number the later ones."""
    counts: dict[str, int] = {}
    distinct = []
    for source in sources:
        counts[source.stem] = counts.get(source.stem, 0) + 1
        number = counts[source.stem]
        distinct.append(source if number == 1 else Source(source.name, source.data, f"{source.stem}-{number}"))
    return distinct
