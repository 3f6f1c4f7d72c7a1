"""The README's commands and examples, run as they stand there."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import florence2
from florence2.cli import main as cli
from florence2.cli.options import check_order, read_questions
from florence2.cli.run import split_arguments

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
COMMANDS = [line.split("#")[0].strip() for line in SHELL if line.startswith("florence2 ")]


@pytest.mark.parametrize("block", range(len(PYTHON)))
def test_python(block: int, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself, with the small checkpoint in place of base."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    load = florence2.load

    def load_small(name: str, **settings: Any) -> florence2.Florence2:
        assert name == "base"
        return load(small_folder, **settings)

    monkeypatch.setattr(florence2, "load", load_small)
    exec(compile(PYTHON[block], f"README.md, block {block}", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_line(command: str) -> None:
    """Every command parses, and its tasks take what they are given."""
    words = shlex.split(command.split("<photo")[0].split(" < ")[0])[1:]
    options = importlib.import_module(cli.COMMANDS[words[0]].module).build_parser().parse_args(words[1:])
    if words[0] == "run":
        check_order("run", options.arguments)
        tasks, images = split_arguments(options.arguments)
        assert images and read_questions(tasks, options.text, options.box)


def test_ci_runs_the_test_command() -> None:
    (command,) = [line for line in SHELL if " -m pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
