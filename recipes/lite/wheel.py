"""Copy the modules of the wheel, with the wheel's names, and build it."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomllib

from florence2 import __version__
from recipes.lite.modules import ROOT, WHEEL, find_modules, rename_imports, wheel_name

_NEEDED = ("numpy", "pillow", "tokenizers")
_BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


def build_wheel(folder: Path) -> Path:
    """Build the wheel in `folder`, which is created; return its path. Raises CalledProcessError when that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        write_source(source)
        command = [sys.executable, "-c", _BUILD, str(folder.absolute())]
        done = subprocess.run(command, cwd=source, check=True, stdout=subprocess.PIPE, text=True)
    return folder / done.stdout.split()[-1]


def write_source(folder: Path) -> None:
    """Write the source of the distribution: its package, its pyproject.toml, the licence and the guide."""
    write_package(folder / WHEEL)
    (folder / "pyproject.toml").write_text(_describe(folder), encoding="utf-8")
    shutil.copy(ROOT.parent / "LICENSE", folder)
    shutil.copy(ROOT.parent / "docs" / "lite.md", folder / "README.md")


def write_package(folder: Path) -> None:
    """Write the package. Raises ValueError when two modules would have one name, or one needs torch."""
    modules = find_modules()
    for module, path in modules.items():
        parts = wheel_name(module).split(".")[1:]
        target = folder.joinpath(*parts, "__init__.py") if path.name == "__init__.py" else folder.joinpath(*parts)
        target = target.with_suffix(".py")
        if target.exists() or target.with_suffix("").exists():
            raise ValueError(f"Two modules would be {wheel_name(module)}; rename the one in florence2/lite.")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rename_imports(path.read_text(encoding="utf-8"), modules), encoding="utf-8")
    with (folder / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(f"\n__version__ = {__version__!r}\n")
    shutil.copy(ROOT / "py.typed", folder)


def _describe(folder: Path) -> str:
    """Return the pyproject.toml; versions and bounds are those of the project's own."""
    project: dict[str, Any] = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [line for line in project["dependencies"] if line.startswith(_NEEDED)]
    packages = sorted({".".join(path.parent.relative_to(folder).parts) for path in folder.rglob("*.py")})
    return f"""[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "florence2-lite"
version = {json.dumps(project["version"])}
description = "Florence-2 without torch: exported models answer all tasks with onnxruntime."
readme = "README.md"
requires-python = {json.dumps(project["requires-python"])}
license = {json.dumps(project["license"])}
license-files = ["LICENSE"]
dependencies = {json.dumps(needed + project["optional-dependencies"]["lite"])}

[project.scripts]
florence2-lite = "{WHEEL}.__main__:main"

[tool.setuptools]
packages = {json.dumps(packages)}

[tool.setuptools.package-data]
{WHEEL} = ["py.typed"]
"""
