"""Results that people read as a table and programs as JSON."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any


class Table(ABC):
    """The base of dataclasses of plain values that are tables: their JSON and their text."""

    @abstractmethod
    def format(self, top: int | None = None) -> str:
        """Return the first `top` rows, or all, as aligned text."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]
        return values

    def to_json(self) -> str:
        """Return `to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        return self.format()


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of aligned columns, the first to the left, the rest to the right; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
