"""The names that `florence2.inspect` exports: few, and all of them documented."""

import re
from pathlib import Path

import florence2.inspect
from florence2.tracing import patches

ROOT = Path(__file__).parents[2]


def documented() -> set[str]:
    """Every word of the documents and studies that a user reads."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.py")]
    return {word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}


def returned(name: str) -> str:
    """Return the return annotation of an export; empty for classes and modules."""
    annotations = getattr(getattr(florence2.inspect, name), "__annotations__", {})
    return str(annotations.get("return", ""))


def test_few_names_are_exported() -> None:
    exported = florence2.inspect.__all__
    assert len(exported) <= 25 and len(set(exported)) == len(exported)
    assert florence2.inspect.patches is patches


def test_each_is_in_a_document_or_returned_by_one_that_is() -> None:
    words = documented()
    known = {name for name in florence2.inspect.__all__ if name in words}
    types = {word for name in known for word in re.findall(r"\w+", returned(name))}
    assert set(florence2.inspect.__all__) <= known | types


def test_verbs_have_complete_docstrings() -> None:
    for name in florence2.inspect.__all__:
        if name != "patches" and name[0].islower():
            text = getattr(florence2.inspect, name).__doc__
            assert "Args:" in text and re.search("Returns:|Yields:", text), name
