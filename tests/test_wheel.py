"""The files of the wheel, whose packages `pyproject.toml` lists: nothing is forgotten, and nothing foreign is in."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """The names in a wheel that is built from a copy of the sources, because a build writes into its folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("florence2", "weights/nano"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("benchmarks", "parity", "recipes", "tests"):  # code alone suffices: it must not be packed
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    built = subprocess.run([sys.executable, "-c", BUILD, str(target)], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(target.glob("*.whl"))) as file:
        return frozenset(name for name in file.namelist() if ".dist-info/" not in name)


def files_of(folder: str) -> set[str]:
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


def test_every_package_is_in(wheel: frozenset[str]) -> None:
    packages = {name for name in files_of("florence2") if name.endswith("__init__.py")}
    assert len(packages) > 10 and packages <= wheel


def test_the_wheel_is_the_package_and_nano(wheel: frozenset[str]) -> None:
    """So page assets and py.typed are in, and recipes, benchmarks, parity and tests are out."""
    assert wheel == files_of("florence2") | {f"florence2/{name}" for name in files_of("weights/nano")}


@pytest.mark.parametrize("name", ["py.typed", "inspect/page/page.html", "weights/nano/model.safetensors"])
def test_what_is_read_at_run_time_is_in(wheel: frozenset[str], name: str) -> None:
    assert f"florence2/{name}" in wheel
