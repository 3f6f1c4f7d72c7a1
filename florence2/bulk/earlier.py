"""The rows and settings that an earlier run left in an output folder. No row is lost, and no damage stops a run."""

import json
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from florence2.bulk.rows import Row, RowKey, count_left_out, has_changed, is_cut_off, row_key
from florence2.checkpoints.files import describe_changes, read_json, written_whole
from florence2.errors import ConfigError, OptionError

DAMAGED_NAME = "damaged-lines.txt"
_MOST_LETTERS = 600  # of a message about settings


@dataclass
class Earlier:
    """The lines of an earlier `results.jsonl`, by their numbers from 0.

    Attributes:
        done: The keys of the rows with an answer that still holds.
        damaged: The lines that are not rows.
        dropped: Failures to write again, answers that a later line replaces, and a last line without its end.
        outdated: The lines of the answers about images that have changed, which stay until their questions are
            answered again.
        ended: Whether the last line ends as a line must.
        requested: The number of answers that still hold and that this run requests.
        cut_off: The number of requested answers that the token limit ended.
        incomplete: The number of requested answers that lack a part.
        left_out: The number of regions that requested answers lack because of their confidence.
    """

    done: set[RowKey] = field(default_factory=set)
    damaged: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    outdated: dict[RowKey, int] = field(default_factory=dict)
    ended: bool = True
    requested: int = 0
    cut_off: int = 0
    incomplete: int = 0
    left_out: int = 0

    def add(self, number: int, row: Mapping[str, Any], requested: Mapping[RowKey, Row] | None) -> None:
        """Sort a row into those that hold and those to write again."""
        key = row_key(row)
        own = None if requested is None else requested.get(key)
        if "error" in row:
            self.dropped += [number] if own or requested is None else []
        elif own and has_changed(row, own.source):
            self.dropped += [self.outdated[key]] if key in self.outdated else []
            self.outdated[key] = number
        elif key not in self.done:
            self.dropped += [self.outdated.pop(key)] if key in self.outdated else []
            self.done.add(key)
            self.requested += own is not None
            self.cut_off += own is not None and is_cut_off(row)
            self.incomplete += own is not None and bool(row.get("missing"))
            self.left_out += 0 if own is None else count_left_out(row)


def read_earlier(results: Path, requested: Mapping[RowKey, Row] | None = None) -> Earlier:
    """Read an earlier `results.jsonl`, if it exists.

    Among the `requested` rows, failures are to be dropped, because this run writes them again, and so are answers about
    images that have changed, once they are replaced; None stands for all rows, and drops all failures.
    """
    earlier = Earlier()
    if not results.exists():
        return earlier
    if not results.is_file():
        raise OptionError(f"{results} is not a regular file; choose another folder.")
    with results.open("rb") as lines:
        for number, line in enumerate(lines):
            row, earlier.ended = parse_row(line), line.endswith(b"\n")
            if row is not None:
                earlier.add(number, row, requested)
            else:
                (earlier.damaged if earlier.ended else earlier.dropped).append(number)
    return earlier


def tidy_up(results: Path, earlier: Earlier) -> str | None:
    """Rewrite `results.jsonl` without its dropped and damaged lines, if it has any, and number the outdated ones again.

    Damaged lines are kept in a file of their own; the sentence that says so is returned.
    """
    if earlier.damaged:
        _copy_lines(results, results.parent / DAMAGED_NAME, frozenset(earlier.damaged), mode="ab")
    left_out = frozenset((*earlier.damaged, *earlier.dropped))
    if left_out or not earlier.ended:
        leave_out(results, left_out)
        ascending = sorted(left_out)
        earlier.outdated = {key: line - bisect_left(ascending, line) for key, line in earlier.outdated.items()}
    if not earlier.damaged:
        return None
    return (
        f"{results} has {len(earlier.damaged)} damaged lines, the first of them line {earlier.damaged[0] + 1}; they "
        f"were moved to {DAMAGED_NAME} next to it, and their questions count as not answered."
    )


def leave_out(results: Path, numbers: Collection[int]) -> None:
    """Rewrite `results.jsonl` without the lines of these numbers."""
    with written_whole(results) as draft:
        _copy_lines(results, draft, numbers, mode="wb", others=True)


def _copy_lines(source: Path, target: Path, numbers: Collection[int], mode: str, others: bool = False) -> None:
    """Copy the lines with these numbers, or all `others`, each with its end."""
    with source.open("rb") as lines, target.open(mode) as copy:
        for number, line in enumerate(lines):
            if (number in numbers) != others:
                copy.write(line if line.endswith(b"\n") else line + b"\n")


def change_lines(results: Path, numbers: Collection[int], change: Callable[[bytes], bytes]) -> None:
    """Rewrite `results.jsonl` with the lines of these numbers changed; Ctrl-C keeps the changes made so far."""
    stopped: KeyboardInterrupt | None = None
    with results.open("rb") as lines, written_whole(results) as draft, draft.open("wb") as copy:
        for number, line in enumerate(lines):
            changed = line
            if number in numbers and stopped is None:
                try:
                    changed = change(line)
                except KeyboardInterrupt as error:
                    stopped = error
            copy.write(changed)
    if stopped is not None:
        raise stopped


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line, or None when the line is not a row."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # also for numbers of many digits, and for lists of great depth
        return None
    named = isinstance(row, dict) and isinstance(row.get("place"), str) and isinstance(row.get("task"), str)
    return row if named and ("text" in row or "caption" in row or "error" in row) else None


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
