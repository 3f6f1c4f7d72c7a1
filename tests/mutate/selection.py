"""The tests that should notice a change of a module: those that mirror it first, then its neighbours."""

import ast
from functools import cache
from pathlib import Path

EXTRAS = tuple(
    f"florence2/{room}/"
    for room in ("dataset", "evaluate", "train", "inspect", "export", "label", "lite", "mcp", "ray", "serve")
)
"""Not the core: mutated where --only names them."""
APART = ("browser", "clients", "interop", "fuzz")
"""Folders of tests that need other packages, or minutes."""
SLOW = (
    *("tests/test_records.py", "tests/test_pipeline.py", "tests/test_touches.py", "tests/test_specimen.py"),
    *("tests/checkpoints/test_every_change.py", "tests/cli/test_torch_free.py", "tests/test_gradients.py"),
)
"""Tests that look at everything, and take long: the last to be asked."""
ELSEWHERE = {
    "__init__.py": "tests/test_imports.py",
    "__main__.py": "tests/test_launch.py",
    "reading.py": "tests/checkpoints/test_parts.py",
}
MOST = 5
"""Test files for each mutant, at most: a change that these do not see is one that nobody finds."""


def sources(root: Path, only: list[str]) -> list[str]:
    """Return the files to change: those below the paths `only`, or the core."""
    every = sorted(path.relative_to(root).as_posix() for path in (root / "florence2").rglob("*.py"))
    if only:
        return [path for path in every if any(f"{path}/".startswith(f"{one.rstrip('/')}/") for one in only)]
    return [path for path in every if not path.startswith(EXTRAS)]


def tests_of(root: Path, path: str) -> list[str]:
    """Return the test files of a source file in the order in which they are asked."""
    mirror, *above = _mirrors(path)
    imported = _imports(root, "tests")
    direct = [test for test, names in imported.items() if module_name(path) in names]
    users = [source for source, names in _imports(root, "florence2").items() if module_name(path) in names]
    room = _room(mirror)
    rooms = {room, _room(room)} - {"tests", ""}  # a room below another may be tested in that
    near = [test for test in imported if _room(test) in rooms]
    ranks: dict[str, int] = {}
    for rank, group in enumerate(([mirror, *above], direct, [_mirrors(user)[0] for user in users], near)):
        for test in group:
            if test in imported:
                ranks.setdefault(test, rank)
    return sorted(ranks, key=lambda test: (ranks[test], test in SLOW, _room(test) != room))[:MOST]


def module_name(path: str) -> str:
    """Return "florence2.model.bart" for "florence2/model/bart.py", and the package for its __init__.py."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _mirrors(path: str) -> list[str]:
    """Return where the tests of a source file should be: in its room, or in one above."""
    folder, _, name = path.removeprefix("florence2/").rpartition("/")
    if name in ELSEWHERE:
        return [ELSEWHERE[name]]
    parts = folder.split("/") if folder else []
    return ["/".join(("tests", *parts[:count], f"test_{name}")) for count in range(len(parts), -1, -1)]


def _room(test: str) -> str:
    return test.rpartition("/")[0]


@cache
def _imports(root: Path, folder: str) -> dict[str, frozenset[str]]:
    """Return the names that every file of `folder` imports, modules and what is in them alike."""
    paths = sorted((root / folder).rglob("*.py" if folder == "florence2" else "test_*.py"))
    public = _public(root)
    found = {path.relative_to(root): _imported(path) for path in paths}
    return {
        path.as_posix(): frozenset(names | {public[name] for name in names & public.keys()})
        for path, names in found.items()
        if path.parts[1] not in APART
    }


@cache
def _public(root: Path) -> dict[str, str]:
    """Return the module that each public name comes from: "florence2.generate" is of florence2.generation.generate."""
    tree = ast.parse((root / "florence2" / "__init__.py").read_text(encoding="utf-8"))
    return {
        f"florence2.{alias.name}": node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "florence2":
            names.add(f"florence2.{node.attr}")
    return names
