"""Results as aligned text and as JSON."""

import json
from dataclasses import dataclass

import pytest

from florence2.inspect.table import Table, format_table


@dataclass(frozen=True)
class Ages(Table):
    rows: tuple[tuple[str, float], ...]

    def format(self, top: int | None = None) -> str:
        return "\n".join(format_table([["name", "age"], *([name, str(age)] for name, age in self.rows[:top])]))


def test_text() -> None:
    ages = Ages((("Zoë", 7), ("Al", 110)))
    assert str(ages).split("\n") == ["name  age", "Zoë     7", "Al    110"]
    assert ages.format(1).split("\n") == ["name  age", "Zoë     7"]


def test_json() -> None:
    ages = Ages((("Zoë", 7),))
    assert ages.to_dict() == {"rows": [["Zoë", 7]]} == json.loads(ages.to_json())
    assert "Zoë" in ages.to_json() and "\n" not in ages.to_json()
    with pytest.raises(ValueError, match="JSON compliant"):
        Ages((("Al", float("nan")),)).to_json()
