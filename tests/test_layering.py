"""The architecture's two rules, read from the import statements."""

import ast
import sys
from pathlib import Path

import pytest

import florence2

PACKAGE = Path(florence2.__file__).parent
READING_ORDER = """
    errors files strict_json config presets coordinates tasks image tokenizer trace attention linear shortcuts davit
    projection bart model packed options rules topk decoding graphed memory generation drawing parsing answers cascade
    layouts tensors adapters checkpoint initialise describe processor hub extras devices pipeline batch sinks cli
    __main__
""".split()
THIRD_PARTY = {"torch", "safetensors", "huggingface_hub", "tokenizers", "numpy", "PIL"}
ONLY_IN = {
    "huggingface_hub": {"hub"},
    "safetensors": {"tensors"},
    "tokenizers": {"tokenizer"},
    "layouts": {"adapters", "checkpoint"},
}
"""Who alone may import something: the network, the file format, the two layouts of names."""


def imports(module: str) -> set[str]:
    """Every module named by an import statement anywhere in a file, as "florence2.x" or a top-level package."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            found |= {f"florence2.{a.name}" for a in node.names} if node.module == "florence2" else {node.module}
    return {name if name.startswith("florence2.") else name.split(".")[0] for name in found}


def test_the_order_lists_every_file() -> None:
    assert sorted(READING_ORDER) == sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", READING_ORDER)
def test_imports_point_up_only(module: str) -> None:
    above = {f"florence2.{name}" for name in READING_ORDER[: READING_ORDER.index(module)]} | {"florence2.__version__"}
    inside = {name for name in imports(module) if name.startswith("florence2.")}
    assert inside <= above, inside - above


@pytest.mark.parametrize("module", [*READING_ORDER, "__init__"])
def test_only_the_allowed_packages(module: str) -> None:
    outside = {name for name in imports(module) if not name.startswith("florence2.")}
    assert outside <= THIRD_PARTY | set(sys.stdlib_module_names), outside


@pytest.mark.parametrize(("name", "allowed"), ONLY_IN.items())
def test_one_place_each(name: str, allowed: set[str]) -> None:
    users = {m for m in READING_ORDER if {name, f"florence2.{name}"} & imports(m)}
    assert users == allowed


def test_decoding_knows_no_model() -> None:
    assert {name for name in imports("decoding") if name.startswith("florence2.")} == {
        "florence2.options",
        "florence2.rules",
        "florence2.topk",
        "florence2.trace",
    }
    for module, known in (("options", {"florence2.errors"}), ("rules", set()), ("topk", set())):
        assert {name for name in imports(module) if name.startswith("florence2.")} == known


def test_the_core_imports_no_folder() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    for module in [*READING_ORDER, "__init__"]:
        assert not {name.split(".")[1] for name in imports(module) if name.startswith("florence2.")} & folders
