"""The modules that `florence2.lite` stands on, read from the import statements, and their names in the wheel."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import florence2

ROOT = Path(florence2.__file__).parent
PACKAGE, LITE, WHEEL = "florence2", "florence2.lite", "florence2_lite"
LAUNCHER = "florence2.__main__"
"""Holds the signals and streams of both programs; the wheel has a `__main__` of its own."""
_STANDARD = set(sys.stdlib_module_names)
AVAILABLE = {"numpy", "PIL", "tokenizers", "onnxruntime", "huggingface_hub"}
"""The packages that the wheel can import; tokenizers brings the last."""


@cache
def find_files() -> dict[str, Path]:
    """Return the file of every module of the package, by the module's name."""
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def find_modules() -> dict[str, Path]:
    """Return the modules of the wheel and their files.

    These are the modules of `florence2.lite`, what they import at any depth, and the packages around them. An import
    within a function is followed too, unless what it imports needs torch: such a function is not for the wheel.

    Raises ValueError when a module needs, as soon as it is imported, what the wheel does not have.
    """
    files = find_files()
    left, known = [name for name in files if _is_lite(name)], set[str]()
    while left:
        name = left.pop()
        if name in known or name == PACKAGE:
            continue
        known.add(name)
        if missing := _missing(name, files, set()):
            raise ValueError(f"{name} needs {missing}, which {WHEEL} does not have.")
        named = _named(files[name]) & files.keys() if _is_lite(name) else set()  # such as those of lazy imports
        others = {*_imported(files[name], nested=True), *named}
        left += [other for other in sorted(others) if not _missing(other, files, set())]
        left += _parents(name)
    return {name: files[name] for name in sorted(known)}


def wheel_name(module: str) -> str:
    """Return the name of a module in the wheel."""
    if module == LAUNCHER:
        return f"{WHEEL}.launch"
    for package in (LITE, PACKAGE):
        if module == package or module.startswith(f"{package}."):
            return f"{WHEEL}{module[len(package) :]}"
    raise AssertionError(module)


def rename_imports(source: str, modules: dict[str, Path]) -> str:
    """Return a file's text with the wheel's names in its imports, and in the strings that are names of modules."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]  # columns count bytes
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and _is_own(node.module):
            _replace(lines, node, node.module)
        elif isinstance(node, ast.Constant) and node.value in modules:
            _replace(lines, node, node.value)
        elif isinstance(node, ast.Import):
            assert not any(_is_own(alias.name) for alias in node.names), "import florence2.x binds the old name"
    return b"".join(lines).decode()


def _replace(lines: list[bytes], node: ast.stmt | ast.expr, module: str) -> None:
    """Replace the first `module` in the line on which `node` begins."""
    line = lines[node.lineno - 1]
    before, after = line[: node.col_offset], line[node.col_offset :]
    lines[node.lineno - 1] = before + after.replace(module.encode(), wheel_name(module).encode(), 1)


def _is_lite(module: str) -> bool:
    return module == LITE or module.startswith(f"{LITE}.")


def _is_own(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _missing(module: str, files: dict[str, Path], seen: set[str]) -> str:
    """Return a package that importing `module` needs and the wheel does not have; empty where there is none."""
    seen.add(module)
    for name in _imported(files[module], nested=False):
        if not _is_own(name):
            if name.split(".")[0] not in AVAILABLE:
                return name
        elif name not in seen and (missing := _missing(name, files, seen)):
            return missing
    return ""


@cache
def _imported(path: Path, nested: bool) -> tuple[str, ...]:
    """Return the modules that a file imports: its own package's, or packages that are not Python's.

    With `nested` those of its own package that functions import as well, and no others.
    """
    statements = _imports(ast.parse(path.read_text(encoding="utf-8")), nested)
    found = {name for statement in statements for name in _names(statement)}
    return tuple(sorted(name for name in found - {PACKAGE} if not nested or _is_own(name)))


def _named(path: Path) -> set[str]:
    """Return the strings in a file, some of which may be names of modules."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _imports(node: ast.AST, nested: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield import statements, without those for type checkers, and without those in functions unless `nested`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            for statement in child.orelse:
                yield from _imports(ast.Module([statement], []), nested)
        elif nested or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(child, nested)


def _names(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield the modules that a statement imports; those of Python itself are left out."""
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    else:
        within = [f"{statement.module}.{alias.name}" for alias in statement.names]
        names = [name if name in find_files() else str(statement.module) for name in within]
    yield from (name for name in names if _is_own(name) or name.split(".")[0] not in _STANDARD)
