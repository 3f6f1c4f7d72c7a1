"""`docs/limits.md` against the constants in the code, in both directions."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import florence2

PACKAGE = Path(florence2.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "limits.md"
UNITS = {"": 1, " MiB": 1 << 20, " GiB": 1 << 30, " %": 0.01}
ROWS = re.findall(r"\| ([\d,]+)( MiB| GiB| %|) \| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8"))
NUMBERED = re.compile(r"MAX_[A-Z_]+")


@pytest.mark.parametrize(("figure", "unit", "constant"), ROWS, ids=[row[2] for row in ROWS])
def test_the_page_says_what_the_code_does(figure: str, unit: str, constant: str) -> None:
    module, _, name = constant.rpartition(".")
    value = getattr(importlib.import_module(f"florence2.{module}"), name)
    assert value == pytest.approx(int(figure.replace(",", "")) * UNITS[unit], rel=1e-12)


def test_every_row_and_every_constant_is_there() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(ROWS) == len(lines) - 4  # two tables, each with a head and a rule
    constants = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for target in node.targets if isinstance(node, ast.Assign) else []:
                if isinstance(target, ast.Name) and NUMBERED.fullmatch(target.id):
                    room = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
                    constants.add(f"{room}.{target.id}")
    missing = constants - {row[2] for row in ROWS}
    assert not missing, f"docs/limits.md lacks {sorted(missing)}"
