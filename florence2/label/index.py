"""A small file next to the rows: which question each line answers, and where the line ends.

With it a run with a million finished rows starts in a second; parsing them would take ten. It means nothing by itself:
where it is missing, is too short or does not match the rows, they are parsed, and it is written again.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from florence2.bulk.earlier import parse_row
from florence2.checkpoints.files import written_whole
from florence2.errors import OptionError
from florence2.label.keys import FAILED, By, row_key, row_state

RECORD = np.dtype([("key", "<u8"), ("end", "<u8"), ("state", "<u4"), ("check", "<u4")])
"""One line: its key, 0 where it is damaged; the offset after it; its state (see `keys`); a checksum of these three."""
_RECORD = struct.Struct("<QQII")
Records = NDArray[Any]
_SAMPLES = 16  # lines that are compared with the file


class Index:
    """The index of one file of rows."""

    def __init__(self, results: Path, by: By):
        """Read the index, and bring it up to date as `refresh` does.

        Raises OSError where a file cannot be read or written, and OptionError where one is not a regular file.
        """
        self.results, self.by = results, by
        self.path = results.with_name(f".{results.stem}.index")
        self._header = f"florence2 rows 1 {by:6}\n".encode()
        self._file: BinaryIO | None = None
        _refuse_others(results, self.path)
        results.touch()
        self.refresh()

    def refresh(self) -> None:
        """Add the lines that have no record; a last line without its end is completed, or cut off.

        Raises OSError where a file cannot be read or written.
        """
        self.close()
        matching = self._read_matching()
        if not len(matching):
            self.path.write_bytes(self._header)
        os.truncate(self.path, len(self._header) + matching.nbytes)
        self._end = int(matching["end"][-1]) if len(matching) else 0
        with self.path.open("ab") as file:
            for line, row in self._mended_lines():
                file.write(self._record(line, row))
        self._file = self.path.open("ab", buffering=0)

    def records(self) -> Records:
        """Return the records of all lines that have one."""
        return np.fromfile(self.path, RECORD, offset=len(self._header))

    def add(self, line: bytes, row: dict[str, Any], end: int) -> None:
        """Add the record of a line that was written and ends at this offset.

        Where a record cannot be written, such as on a full disk, or a line before this one has none, no more are
        added; `refresh` adds them.
        """
        if self._file is None or end - len(line) != self._end:
            self.close()
            return
        try:
            self._file.write(self._record(line, row))
        except OSError:
            self.close()

    def _record(self, line: bytes, row: dict[str, Any] | None) -> bytes:
        """Return the record of the line after the last one; None stands for a damaged one."""
        key, state = self._describe(row)
        self._end += len(line)
        return _RECORD.pack(key, self._end, state, _checksum(key, self._end, state))

    def _describe(self, row: dict[str, Any] | None) -> tuple[int, int]:
        return (0, FAILED) if row is None else (row_key(row, self.by), row_state(row))

    def replace(self, records: Records) -> None:
        """Write other records in place of all."""
        self.close()
        with written_whole(self.path) as draft, draft.open("wb") as file:
            file.write(self._header)
            records.tofile(file)
        self._end = int(records["end"][-1]) if len(records) else 0
        self._file = self.path.open("ab", buffering=0)

    def remove(self) -> None:
        """Delete the index, so that none is there while the rows are replaced."""
        self.close()
        self.path.unlink()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def _read_matching(self) -> Records:
        """Return the records that match the rows, or none."""
        none = np.empty(0, RECORD)
        try:
            with self.path.open("rb") as file:
                if file.read(len(self._header)) != self._header:
                    return none
            records = self.records()  # without half a record at the end
        except FileNotFoundError:
            return none
        key, end, state = (records[name].astype(np.uint64) for name in ("key", "end", "state"))
        ascending = bool((np.diff(end.astype(np.int64), prepend=0) > 0).all())
        if not ascending or not np.array_equal(_checksum(key, end, state), records["check"]):
            return none
        records = records[end <= self.results.stat().st_size]
        return records if len(records) and self._matches(records) else none

    def _matches(self, records: Records) -> bool:
        """Return whether the last line and some others are those that the records describe."""
        numbers = np.unique(np.linspace(0, len(records) - 1, _SAMPLES).astype(int))
        with self.results.open("rb") as file:
            for number in numbers.tolist():
                start = int(records["end"][number - 1]) if number else 0
                file.seek(start)
                line = file.read(int(records["end"][number]) - start)
                described = int(records["key"][number]), int(records["state"][number])
                if not line.endswith(b"\n") or b"\n" in line[:-1] or self._describe(parse_row(line)) != described:
                    return False
        return True

    def _mended_lines(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Yield the lines without records, and their rows or None for damaged ones; mend the last line."""
        with self.results.open("rb+") as file:
            start = file.seek(self._end)
            while line := file.readline():
                row = parse_row(line)
                if not line.endswith(b"\n") and row is None:
                    file.truncate(start)
                    return
                if not line.endswith(b"\n"):
                    line += b"\n"
                    file.write(b"\n")
                start += len(line)
                yield line, row


def _checksum(key: Any, end: Any, state: Any) -> Any:
    """Return 32 bits of three numbers, or of three arrays of uint64: the upper half of a sum of products."""
    total = key * 0x9E3779B97F4A7C15 + end * 0xC2B2AE3D27D4EB4F + state * 0x165667B19E3779F9
    return (total & 0xFFFFFFFFFFFFFFFF) >> 32


def _refuse_others(*paths: Path) -> None:
    for path in paths:
        if path.exists() and not path.is_file():
            raise OptionError(f"{path} is not a regular file; choose another folder.")


class Finished:
    """The answered questions, each a number of 8 bytes that stands for its key and for the version of the image's file.

    Where versions do not count, the number is the key. Questions about files that are gone need the keys too; they are
    read from the index when the first of them comes.
    """

    def __init__(self, index: Index, records: Records):
        """Take the questions whose last row is an answer; `records` are those of the index."""
        self._index = index
        answered = _answered(records)
        keys = answered["key"].copy()
        self._keys = keys if index.by == "id" else None
        self._versions = np.sort(_mixed(keys, answered["state"].astype(np.uint64))) if index.by != "id" else keys

    def __len__(self) -> int:
        return len(self._versions)

    def holds(self, key: int, state: int | None) -> bool:
        """Return whether a question is answered about this version of the image's file; None is about any."""
        if state is not None and self._index.by != "id":
            return _holds(self._versions, _mixed(key, state) & 0xFFFFFFFFFFFFFFFF)
        if self._keys is None:
            self._keys = _answered(self._index.records())["key"].copy()
        return _holds(self._keys, key)


def _answered(records: Records) -> Records:
    """Return the last record of each question whose last row is an answer, in the order of the keys."""
    last = last_of_each(records)
    answered: Records = records[last[records["state"][last] != FAILED]]
    return answered


def _mixed(key: Any, state: Any) -> Any:
    """Return one number for a key and a state, or for arrays of both: for one key, states give different ones."""
    return key ^ (state * 0x9E3779B97F4A7C15)


def _holds(ascending: NDArray[np.uint64], number: int) -> bool:
    place = int(ascending.searchsorted(np.uint64(number)))
    return place < len(ascending) and int(ascending[place]) == number


def last_of_each(records: Records) -> NDArray[np.int64]:
    """Return the number of the last line of each key, in the order of the keys, without damaged lines."""
    order = np.argsort(records["key"], kind="stable")
    keys = records["key"][order]
    ends = np.append(keys[1:] != keys[:-1], True) if len(keys) else np.empty(0, bool)
    kept: NDArray[np.int64] = order[ends & (keys != 0)]
    return kept
