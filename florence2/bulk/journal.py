"""An output folder: each row is written at once, and a later run sees which rows are finished."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from florence2.bulk.rows import Result, Row, RowKey, row_key
from florence2.checkpoints.files import read_json, write_json, written_whole
from florence2.errors import OptionError


class Folder:
    """An output folder: `results.jsonl`, `settings.json`, and drawn images when `draw` is set.

    `done` holds the keys of the rows that an earlier run finished; its failures are tried again.
    """

    def __init__(self, path: Path, draw: bool, settings: Mapping[str, Any]):
        """Open or make the folder.

        Raises OptionError when `path` is a file, and when the folder holds answers made with other `settings`: one
        file must not mix them.
        """
        self.path, self.draw = path, draw
        if path.exists() and not path.is_dir():
            raise OptionError(f"{path} is a file; answers need a folder.")
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
        """Write one row, and its drawing if it has regions to draw."""
        values = row.to_dict()
        if self.draw and row.answer is not None and has_regions(row.answer):
            values["drawing"] = self._draw(row, row.answer)
        self.file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self.file.flush()

    def _draw(self, row: Row, answer: Result) -> str:
        """Draw the answer on its image; return the new file's path inside the folder."""
        target = _unused(self.path / f"{row.source.stem}.{row.question.alias}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as draft:
            answer.draw(row.source.data).save(draft, format="PNG")
        return str(target.relative_to(self.path))


def has_regions(result: Result) -> bool:
    """Return whether a result has something to draw."""
    return bool(result.boxes or result.quads or result.polygons)


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


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _hold_settings(file: Path, settings: Mapping[str, Any], results: Path) -> None:
    """Write the settings of a new folder; refuse settings that differ from those of earlier answers."""
    if not (file.exists() and results.exists() and results.stat().st_size):  # without rows nothing can be mixed
        write_json(file, dict(settings))
        return
    before = read_json(file)
    changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in changed)
        raise OptionError(f"{file.parent} holds answers made with other settings ({listed}); choose another folder.")


def _unused(path: Path) -> Path:
    """Return `path`, numbered when a file of that name exists."""
    numbered = (path.with_name(f"{path.stem}-{count}{path.suffix}") for count in itertools.count(2))
    return path if not path.exists() else next(name for name in numbered if not name.exists())
