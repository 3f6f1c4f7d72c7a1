"""The wheel of florence2-lite: built by its one command, installed where torch is not, and run there on nano."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import florence2
from florence2.cli.main import main
from parity.specimen import SCENES_SEED
from recipes.nano.exam import Exam

ROOT = Path(florence2.__file__).parent.parent
MOST_MEGABYTES = 250
ANSWER = """
import importlib.util, json, sys
from florence2_lite import load
assert not any(importlib.util.find_spec(name) for name in ("torch", "florence2", "safetensors"))
f = load(sys.argv[1])
rows = [f.run(task, sys.argv[2], num_beams=beams).token_ids for task in json.load(sys.stdin) for beams in (1, 3)]
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a virtual environment with the wheel alone."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "recipes.lite", str(wheels)], check=True, cwd=ROOT)
    (wheel,) = wheels.glob("florence2_lite-*.whl")
    venv.create(folder, with_pip=True)
    install = ["-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run([str(folder / "bin" / "python"), *install], check=True)
    return folder


def test_every_task_of_nano(environment: Path, tmp_path: Path) -> None:
    sample = Exam(SCENES_SEED, 6)[5]
    sample.image.save(tmp_path / "scene.png")
    assert main(["export", "nano", str(tmp_path / "nano")]) == 0
    prefixes = [prefix for prefix, _ in sample.pairs]
    command = [str(environment / "bin" / "python"), "-c", ANSWER, str(tmp_path / "nano"), str(tmp_path / "scene.png")]
    done = subprocess.run(
        command, input=json.dumps(prefixes), capture_output=True, text=True, cwd=tmp_path, env={}, check=False
    )
    assert done.returncode == 0, done.stderr
    f = florence2.load("nano", device="cpu")
    expected = [
        list(f.run(prefix, tmp_path / "scene.png", num_beams=beams).token_ids)
        for prefix in prefixes
        for beams in (1, 3)
    ]
    assert json.loads(done.stdout) == expected and len(prefixes) >= 14


def test_the_command_line(environment: Path, tmp_path: Path) -> None:
    for command in ([environment / "bin" / "florence2-lite"], [environment / "bin" / "python", "-m", "florence2_lite"]):
        done = subprocess.run([*command, "run", "--help"], capture_output=True, text=True, cwd=tmp_path, env={})
        assert done.returncode == 0 and "python -m florence2_lite run [options] TASK... IMAGE..." in done.stdout


def test_how_much_is_installed(environment: Path) -> None:
    """Without pip and setuptools, which bring environments about and are not needed afterwards."""
    (packages,) = environment.glob("lib/python*/site-packages")
    tools = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
    files = [
        path for each in packages.iterdir() if not each.name.startswith(tools) for path in [each, *each.rglob("*")]
    ]
    megabytes = sum(path.stat().st_size for path in files if path.is_file()) / 1e6
    print(f"{megabytes:.0f} MB")
    assert megabytes <= MOST_MEGABYTES
