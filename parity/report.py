"""Comparisons, their table, and the recorded tolerances that decide whether they pass."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HEADROOM = 5.0
"""A tolerance is this many times the difference that was measured when it was recorded."""
TOLERANCES = Path(__file__).parent / "tolerances.json"


@dataclass(frozen=True)
class Comparison:
    """One stage compared on one subject: how many items were equal, and the largest difference of their numbers.

    `group` is the first part of the tolerance's key; `difference` is None where only equality counts; `ties` counts the
    items that differ by a choice between scores that are equal up to rounding (see `parity.ties`).
    """

    group: str
    subject: str
    stage: str
    equal: int
    total: int
    difference: float | None = None
    note: str = ""
    ties: int = 0

    @property
    def key(self) -> str:
        """Return the key of the tolerance."""
        return f"{self.group}: {self.stage}"

    def passes(self, tolerances: dict[str, float]) -> bool:
        """Return whether anything was compared, and everything was equal, tied or within its tolerance."""
        close = self.difference is None or self.difference <= tolerances.get(self.key, 0.0)
        return close and self.equal + self.ties == self.total > 0


def largest_difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference between two tensors, arrays, lists or numbers of one shape; infinite for NaN."""
    difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
    return float(np.nan_to_num(difference, nan=np.inf).max())


def load_tolerances() -> dict[str, float]:
    """Load the recorded tolerances; empty if none are recorded yet."""
    if not TOLERANCES.exists():
        return {}
    recorded: dict[str, float] = json.loads(TOLERANCES.read_text())
    return recorded


def record_tolerances(rows: Iterable[Comparison]) -> None:
    """Record `HEADROOM` times the largest difference of every key; keep the tolerances of keys not measured now."""
    largest: dict[str, float] = {}
    for row in rows:
        if row.difference is not None:
            largest[row.key] = max(largest.get(row.key, 0.0), HEADROOM * row.difference)
    merged = load_tolerances() | {key: float(f"{value:.2g}") for key, value in largest.items()}
    TOLERANCES.write_text(json.dumps(dict(sorted(merged.items())), indent=1) + "\n")


def format_table(rows: Iterable[Comparison], tolerances: dict[str, float]) -> str:
    """Format comparisons as a table in Markdown."""
    head = ["comparison", "stage", "equal", "largest difference", "tolerance", ""]
    body = []
    for row in rows:
        numbers = ["", ""]
        if row.difference is not None:
            numbers = [f"{row.difference:.1e}", f"{tolerances.get(row.key, 0.0):.1e}"]
        equal = f"{row.equal} of {row.total}" + (f", {row.ties} tied" if row.ties else "")
        verdict = "ok" if row.passes(tolerances) else "**DIFFERS**"
        body.append([row.subject, row.stage, equal, *numbers, " ".join(filter(None, (verdict, row.note)))])
    return format_rows(head, body)


def format_rows(head: list[str], body: list[list[str]]) -> str:
    """Format cells as a table in Markdown."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
