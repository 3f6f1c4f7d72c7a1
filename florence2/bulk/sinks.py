"""Where rows go: the console, an output folder, and how far the work is.

Rows are written as soon as they are known, to a JSON Lines file that also says, next time, what is done already.
"""

import itertools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from florence2.answers.answer import Answer
from florence2.answers.cascade import Cascade
from florence2.bulk.batch import Row, RowKey, row_key
from florence2.checkpoints.files import read_json, write_json, written_whole
from florence2.errors import OptionError

_PROGRESS_SECONDS = 10.0  # between progress lines where they cannot overwrite each other


class Sink(Protocol):
    """Where rows go."""

    def __call__(self, row: Row) -> None:
        """Take one row, at once and for good."""
        ...


class Folder:
    """An output folder: `results.jsonl`, the settings it was made with, and drawn pictures when `draw` is set."""

    def __init__(self, path: Path, draw: bool, settings: Mapping[str, Any]):
        """Open the folder. `done` then holds what an earlier run finished; its failures are to be tried again.

        Raises OptionError when an earlier run had other `settings`: one file is not to mix their answers.
        """
        self.path, self.draw = path, draw
        self.path.mkdir(parents=True, exist_ok=True)
        results = self.path / "results.jsonl"
        _hold_settings(self.path / "settings.json", settings, results)
        self.done = _keep_finished(results) if results.exists() else frozenset()
        self.file = results.open("a", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __call__(self, row: Row) -> None:
        values = row.to_dict()
        if self.draw and row.answer is not None and _has_regions(row.answer):
            target = _unused(self.path / f"{row.source.stem}.{row.question.alias}.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(target) as draft:
                row.answer.draw(row.source.data).save(draft, format="PNG")
            values["drawing"] = str(target.relative_to(self.path))
        self.file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self.file.flush()


class Console:
    """Rows on stdout, as text for people or JSON Lines for programs; failures as text on stderr."""

    def __init__(self, as_json: bool, headings: bool):
        self.as_json, self.headings = as_json, headings

    def __call__(self, row: Row) -> None:
        if self.as_json:
            unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
            print(json.dumps(row.to_dict(), ensure_ascii=not unicode), flush=True)
        elif row.error is not None:
            name = "" if row.source.name in row.error else f"{row.source.name}: "
            print(f"florence2: {name}{row.error}", file=sys.stderr)
        else:
            if self.headings:
                print(f"== {row.source.name}  {row.question.name}")
            print(row.answer, flush=True)


class Progress:
    """Pictures or other `things` done, seconds each, and time left, on stderr; silent for a single one."""

    def __init__(self, total: int, stream: TextIO | None = None, things: str = "pictures"):
        self.total, self.stream, self.things = total, stream or sys.stderr, things
        self.began = self.told = time.monotonic()
        self.on_terminal = self.stream.isatty()

    def show(self, finished: int) -> None:
        """Tell how far the work is."""
        now = time.monotonic()
        if self.total < 2 or not (self.on_terminal or now - self.told > _PROGRESS_SECONDS):
            return
        self.told = now
        each = (now - self.began) / max(1, finished)
        left = _clock(each * (self.total - finished))
        line = f"{finished}/{self.total} {self.things}, {each:.2f} s each, {left} left"
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
        written_whole(results) as draft,
        draft.open("w", encoding="utf-8") as new,
    ):
        for line in old:
            row = _parse_row(line)
            if row is not None and "error" not in row:
                keys.add(row_key(row))
                new.write(line if line.endswith("\n") else line + "\n")
    return frozenset(keys)


def _hold_settings(file: Path, settings: Mapping[str, Any], results: Path) -> None:
    if not (file.exists() and results.exists()):
        write_json(file, dict(settings))
        return
    before = read_json(file)
    changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in changed)
        raise OptionError(f"{file.parent} holds answers made with other settings ({listed}); choose another folder.")


def _unused(path: Path) -> Path:
    """`path`, or with a number when a file of that name exists."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _has_regions(answer: Answer | Cascade) -> bool:
    found = answer.grounding if isinstance(answer, Cascade) else answer
    return bool(found.boxes or found.quads or found.polygons)
