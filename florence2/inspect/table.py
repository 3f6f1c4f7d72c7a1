"""Results that people read as a table and programs as JSON."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any


class Table(ABC):
    """What a dataclass of plain values has in common when it is a table: its JSON and its text."""

    @abstractmethod
    def format(self, top: int | None = None) -> str:
        """The first `top` rows, or all, as aligned text."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]
        return values

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        return self.format()


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first to the left, the others to the right; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
