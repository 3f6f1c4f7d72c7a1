"""The rows and settings that an earlier run left in an output folder. No row is lost, and no damage stops a run."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.bulk.rows import RowKey, row_key
from florence2.checkpoints.files import describe_changes, read_json, written_whole
from florence2.errors import ConfigError, OptionError

DAMAGED_NAME = "damaged-lines.txt"
_ANSWERS = frozenset(("text", "caption", "error"))  # one of these is in every row
_MOST_LETTERS = 600  # of a message about settings


@dataclass(frozen=True)
class Earlier:
    """The lines of an earlier `results.jsonl`, by their numbers from 0.

    Attributes:
        done: The keys of the rows with an answer.
        damaged: The lines that are not rows.
        dropped: The rows to write again, and a last line that was not written to its end.
        ended: Whether the last line ends as a line must.
    """

    done: frozenset[RowKey] = frozenset()
    damaged: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    ended: bool = True


def read_earlier(results: Path, retried: Collection[RowKey] | None = None) -> Earlier:
    """Read an earlier `results.jsonl`, if it exists.

    Failures whose key is in `retried` are to be dropped, because this run asks again; None drops all failures.
    """
    if not results.exists():
        return Earlier()
    if not results.is_file():
        raise OptionError(f"{results} is not a regular file; choose another folder.")
    done: set[RowKey] = set()
    damaged: list[int] = []
    dropped: list[int] = []
    ended = True
    with results.open("rb") as lines:
        for number, line in enumerate(lines):
            row, ended = _parse_row(line), line.endswith(b"\n")
            if row is None:
                (damaged if ended else dropped).append(number)
            elif "error" not in row:
                done.add(row_key(row))
            elif retried is None or row_key(row) in retried:
                dropped.append(number)
    return Earlier(frozenset(done), tuple(damaged), tuple(dropped), ended)


def tidy_up(results: Path, earlier: Earlier) -> str | None:
    """Rewrite `results.jsonl` without its dropped and damaged lines, if it has any.

    Damaged lines are kept in a file of their own; the sentence that says so is returned.
    """
    if earlier.damaged:
        _copy_lines(results, results.parent / DAMAGED_NAME, frozenset(earlier.damaged), mode="ab")
    left_out = frozenset((*earlier.damaged, *earlier.dropped))
    if left_out or not earlier.ended:
        with written_whole(results) as draft:
            _copy_lines(results, draft, left_out, mode="wb", others=True)
    if not earlier.damaged:
        return None
    return (
        f"{results} has {len(earlier.damaged)} damaged lines, the first of them line {earlier.damaged[0] + 1}; they "
        f"were moved to {DAMAGED_NAME} next to it, and their questions count as not answered."
    )


def _copy_lines(source: Path, target: Path, numbers: Collection[int], mode: str, others: bool = False) -> None:
    """Copy the lines with these numbers, or all `others`, each with its end."""
    with source.open("rb") as lines, target.open(mode) as copy:
        for number, line in enumerate(lines):
            if (number in numbers) != others:
                copy.write(line if line.endswith(b"\n") else line + b"\n")


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line, or None when the line is not a row."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # also for numbers of many digits, and for lists of great depth
        return None
    named = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("place", "task"))
    return row if named and not _ANSWERS.isdisjoint(row) else None


def check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Raise OptionError when `settings` differ from those of the answers that the folder holds."""
    if not file.exists():
        return
    try:
        changes = describe_changes(read_json(file), settings)
    except (ConfigError, RecursionError) as error:
        reason = "it is too deep" if isinstance(error, RecursionError) else str(error).rstrip(".")
        raise OptionError(
            f"{file} is damaged, so it is unknown with which settings the answers next to it were made: {reason}. "
            "Delete the file if they are those of this command, or choose another folder."
        ) from None
    if changes:
        changes = changes if len(changes) <= _MOST_LETTERS else f"{changes[:_MOST_LETTERS]}..."
        raise OptionError(f"{file.parent} holds answers made with other settings ({changes}); choose another folder.")
