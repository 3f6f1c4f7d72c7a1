"""The package of the wheel: which modules it has, their names, and that they run where `florence2` is missing.

`tests/clients` builds the wheel itself and installs it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.lite import modules as lite_modules
from recipes.lite.modules import find_files, find_modules, rename_imports, wheel_name
from recipes.lite.wheel import write_source
from recipes.nano.exam import Exam

ALONE = """
import sys
for name in ("torch", "florence2"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
from florence2_lite import OnlyLabels, __version__, load
f = load(sys.argv[2], threads=1)
print(__version__, len(f.run("<OD>", sys.argv[3], num_beams=1).boxes) > 0)
from florence2_lite.command import main
sys.exit(main(["cascade", sys.argv[3], "--model", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_source(folder)
    return folder


@pytest.mark.release
def test_it_runs_where_neither_torch_nor_florence2_is(
    source: Path, nano_folder: Path, scenes: Exam, tmp_path: Path
) -> None:
    scenes[0].image.save(tmp_path / "a.png")
    command = [sys.executable, "-c", ALONE, str(source), str(nano_folder), str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "0.1.0 True" and len(done.stdout.splitlines()) > 2


def test_what_is_in() -> None:
    names = {*find_modules()}
    assert {"florence2.lite.search.search", "florence2.cli.cascade", "florence2.asking.questions"} <= names
    assert not names & {"florence2", "florence2.pipeline", "florence2.generation.search", "florence2.model.florence2"}


def test_no_import_of_the_old_package_is_left(source: Path) -> None:
    """But those within functions that the wheel is not for."""
    kept = {wheel_name(name) for name in find_modules()}
    for path in (source / "florence2_lite").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("florence2"):
                module = str(node.module)
                within = {f"{module}.{alias.name}" for alias in node.names}
                assert module == "florence2_lite" or module in kept or within <= kept, path


def test_names() -> None:
    assert wheel_name("florence2") == wheel_name("florence2.lite") == "florence2_lite"
    assert wheel_name("florence2.lite.search.rules") == "florence2_lite.search.rules"
    assert wheel_name("florence2.inputs.image") == "florence2_lite.inputs.image"
    assert wheel_name("florence2.__main__") == "florence2_lite.launch"


def test_renaming() -> None:
    text = (
        '"""See `florence2.lite` and florence2.errors."""\n'
        "from florence2 import __version__\n"
        "from florence2.lite.search.search import (\n    search,\n)\n"
        'ä = f("florence2.errors", "florence2.train.command", "florence2.errors is a module")\n'
    )
    renamed = rename_imports(text, find_modules())
    assert renamed == (
        '"""See `florence2.lite` and florence2.errors."""\n'
        "from florence2_lite import __version__\n"
        "from florence2_lite.search.search import (\n    search,\n)\n"
        'ä = f("florence2_lite.errors", "florence2.train.command", "florence2.errors is a module")\n'
    )


def test_a_module_that_needs_torch_stops_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "more.py"
    path.write_text("from florence2.model.bart import Decoder\n")
    files = {**find_files(), "florence2.lite.more": path}
    monkeypatch.setattr(lite_modules, "find_files", lambda: files)
    with pytest.raises(ValueError, match=r"florence2\.lite\.more needs torch, which florence2_lite does not have"):
        find_modules()
