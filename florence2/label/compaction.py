"""The lines of a journal in input order, one for each question: written whole or not at all, by copying byte ranges."""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from florence2.bulk.earlier import DAMAGED_NAME
from florence2.checkpoints.files import written_whole
from florence2.label.index import Index, Records, last_of_each
from florence2.label.keys import FAILED

_BLOCK = 1 << 20  # bytes copied at once


class Others(NamedTuple):
    """Questions with rows that a command does not ask: how many there are, and how many of them are errors."""

    rows: int
    failed: int


def count_others(index: Index, order: NDArray[np.uint64]) -> Others:
    """Count the questions that have rows and other keys than these."""
    last = index.records()[last_of_each(index.records())]
    others = last["state"][~np.isin(last["key"], order)]
    return Others(len(others), int((others == FAILED).sum()))


def compact(index: Index, order: NDArray[np.uint64], keep_failed: bool = True) -> bool:
    """Write the rows of an index in the order of these keys; return False if they are in it already.

    Of several rows with one key the last stays. Rows with other keys, such as those of another input, come at the end;
    without `keep_failed`, those of them that are errors are left out. Damaged lines are moved to a file of their own.
    Raises OSError where a file cannot be written; the rows then stay unchanged.
    """
    index.refresh()  # no row may be without a record now
    records = index.records()
    kept = _choose_lines(records, order, keep_failed)
    if np.array_equal(kept, np.arange(len(records))):
        return False
    starts = np.concatenate([[0], records["end"][:-1]]).astype(np.int64)
    with index.results.open("rb") as old:
        _keep_damaged(index, old, records, starts)
        with written_whole(index.results) as draft:
            with draft.open("wb") as file:
                for start, end in _ranges(kept, starts, records["end"].astype(np.int64)):
                    _copy(old, file, start, end)
                file.flush()
                os.fsync(file.fileno())
            index.remove()
    moved = records[kept]
    moved["end"] = np.cumsum(records["end"][kept].astype(np.int64) - starts[kept])
    index.replace(moved)
    return True


def _choose_lines(records: Records, order: NDArray[np.uint64], keep_failed: bool) -> NDArray[np.int64]:
    """Return the numbers of the lines to keep, in the order in which they are written."""
    last = last_of_each(records)
    if not len(last):
        return last
    keys = records["key"][last]
    places = np.minimum(keys.searchsorted(order), len(keys) - 1)
    wanted = last[places[keys[places] == order]]
    wanted = wanted[np.sort(np.unique(wanted, return_index=True)[1])]  # the first of each
    others = np.setdiff1d(last, wanted)  # in the order in which they are there
    return np.concatenate([wanted, others if keep_failed else others[records["state"][others] != FAILED]])


def _ranges(kept: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of lines; those that follow one another are one range."""
    firsts = np.append(0, np.flatnonzero(np.diff(kept) != 1) + 1) if len(kept) else np.empty(0, int)
    lasts = np.append(firsts[1:], len(kept)) - 1 if len(kept) else firsts
    yield from zip(starts[kept[firsts]].tolist(), ends[kept[lasts]].tolist(), strict=True)


def _copy(old: BinaryIO, new: BinaryIO, start: int, end: int) -> None:
    old.seek(start)
    while start < end:
        block = old.read(min(_BLOCK, end - start))
        new.write(block)
        start += len(block)


def _keep_damaged(index: Index, old: BinaryIO, records: Records, starts: NDArray[np.int64]) -> None:
    """Copy the damaged lines to a file of their own."""
    damaged = np.flatnonzero(records["key"] == 0)
    if len(damaged):
        with (index.results.parent / DAMAGED_NAME).open("ab") as file:
            for number in damaged.tolist():
                _copy(old, file, int(starts[number]), int(records["end"][number]))
