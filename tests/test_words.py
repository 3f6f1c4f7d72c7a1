"""The words of the package: plain English, one term for one thing."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import florence2

PACKAGE = Path(florence2.__file__).parent
BANNED = {
    r"(?<![Tt]here )\b(is|are|was) no (?!longer|more)": "is not a, has no, no ... exists",
    r"\bbehind\b": "after",
    r"\b(goes|go|gone|going|went) on\b": "continue, resume",
    r"\banew\b": "again",
    r"\b[Ww]hat (is|are)\b": "name the thing",
    r"\bof which\b": "say it in two sentences",
    r"\bas good as\b": "almost",
    r"\bin (its|their) turn\b": "then",
    r"\bfor ever\b": "without end",
    r"\bmade[- ]up\b": "synthetic",
    r"\b[Pp]ictures?\b": "image",
    r"\bours\b": "canonical, or this package's",
    r"\brematerial": "gradient checkpointing",
}
"""Phrases that read like a translation, or a second word for one thing; and what to write instead."""
KEPT = {task.sentence for task in florence2.TASKS.values()}
"""The sentences that the model was trained on."""


@cache
def every_text() -> list[tuple[Path, int, str]]:
    return [(path, line, text) for path in sorted(PACKAGE.rglob("*.py")) for line, text in texts(path)]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every string of a file, docstrings, help and messages among them, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            if node.value.lstrip().startswith("I me mine"):  # labels that the reference drops
                continue
            yield node.lineno, " ".join(node.value.split())


@pytest.mark.parametrize("phrase", BANNED)
def test_no_string_of_the_package_reads_like_a_translation(phrase: str) -> None:
    places = [
        f"{path.relative_to(PACKAGE)}:{line} {found.group()!r} in {text[:100]!r}; better: {BANNED[phrase]}"
        for path, line, text in every_text()
        if text not in KEPT and (found := re.search(phrase, text))
    ]
    assert not places, "\n".join(places)


def test_no_two_public_classes_have_one_name() -> None:
    names: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: places for name, places in names.items() if len(places) > 1} == {}
