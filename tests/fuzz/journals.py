"""The journal of a labelling run with spoilt bytes in its rows or its index, against a plain reading of the rows."""

import json
from array import array
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from florence2.bulk.earlier import DAMAGED_NAME, parse_row
from florence2.label.journal import Journal
from florence2.label.keys import By, row_key
from tests.fuzz.worker import expect
from tests.label.conftest import row

Spoil: TypeAlias = tuple[str, float, int, bytes]
"""A file, where in it from 0 to 1, how many bytes are replaced, and by which."""
Round: TypeAlias = tuple[list[tuple[str, bool]], list[Spoil], list[str] | None]
"""Rows to write, by image and whether answered; what is spoilt; the order in which all are put, if they are."""

_NAMES = "abcdefghij"


def draw(random: Random) -> tuple[By, list[Round]]:
    return random.choice(("place", "id")), [_draw_round(random) for _ in range(random.randrange(1, 5))]


def _draw_round(random: Random) -> Round:
    rows = [(random.choice(_NAMES), random.random() < 0.7) for _ in range(random.choice((0, 3, 30)))]
    spoils = []
    for _ in range(random.choice((0, 1, 2))):
        put = random.choice((b"", b"\n", b"\0", random.randbytes(8), b'{"place": "x", "task": "y", "text": ""}\n'))
        file = random.choice(("results.jsonl", ".results.index"))
        spoils.append((file, random.choice((1.0, random.random())), random.choice((0, 1, 24, 300)), put))
    order = random.sample(_NAMES, random.randrange(len(_NAMES))) if random.random() < 0.5 else None
    return rows, spoils, order


def check(case: tuple[By, list[Round]], place: Path) -> None:
    by, rounds = case
    for rows, spoils, order in rounds:
        with Journal(place / "out", {}, by=by) as journal:
            for name, answered in rows:
                journal(row(name, f"{len(rows)} {name}" if answered else None))
        for file, share, count, put in spoils:
            _spoil(place / "out" / file, share, count, put)
        before = _lines(place / "out")
        last = _last_rows(before, by)
        with Journal(place / "out", {}, by=by) as journal:
            answered_keys = {key for key, line in last.items() if "error" not in json.loads(line)}
            held = {key for key in last if journal.finished.holds(key, None)}
            expect(held == answered_keys and len(journal.finished) == len(held), "other questions count as finished")
            expect(_whole(_lines(place / "out")) == _whole(before), "a row was changed when the journal was opened")
            if order is not None:
                _check_order(journal, [row_key(row(name).to_dict(), by) for name in order], last, before)


def _check_order(journal: Journal, keys: list[int], last: dict[int, bytes], before: list[bytes]) -> None:
    journal.compact(array("Q", keys))
    lines = _lines(journal.folder)
    wanted = [last[key] for key in keys if key in last]
    expect(lines[: len(wanted)] == wanted, "the rows are in another order")
    expect(sorted(lines) == sorted(last.values()), "a row was lost or doubled, or is another one")
    damaged = [line for line in _whole(before) if parse_row(line) is None]
    kept = journal.folder / DAMAGED_NAME
    stored = kept.read_bytes() if kept.exists() else b""
    expect(all(line in stored for line in damaged), "a damaged line was lost")


def _spoil(file: Path, share: float, count: int, put: bytes) -> None:
    content = file.read_bytes()
    # a row that is changed without a change of length may go unnoticed: a million rows are not read again
    count += count == len(put) > 0 and file.suffix == ".jsonl"
    start = int(share * len(content))
    start = max(0, start - count) if share == 1.0 else start
    file.write_bytes(content[:start] + put + content[start + count :])


def _lines(folder: Path) -> list[bytes]:
    return (folder / "results.jsonl").read_bytes().splitlines(keepends=True)


def _whole(lines: list[bytes]) -> list[bytes]:
    """The lines with their ends, without a torn last one."""
    return [line if line.endswith(b"\n") else line + b"\n" for line in lines if line.endswith(b"\n") or parse_row(line)]


def _last_rows(lines: list[bytes], by: By) -> dict[int, bytes]:
    rows: list[tuple[bytes, dict[str, Any] | None]] = [(line, parse_row(line)) for line in _whole(lines)]
    return {row_key(values, by): line for line, values in rows if values is not None}
