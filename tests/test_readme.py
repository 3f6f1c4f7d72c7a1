"""The README's commands and examples, run as they stand there."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import florence2
from florence2.bulk.questions import check_order, read_questions
from florence2.checkpoints.presets import preset
from florence2.cli import main as cli
from florence2.cli.run import split_arguments

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
COMMANDS = [line.split("#")[0].strip() for line in SHELL if line.startswith("florence2 ")]


@pytest.mark.parametrize("block", range(len(PYTHON)))
def test_python(block: int, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself, with the small checkpoint in place of base; shapes in its comments hold for both."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    load = florence2.load

    def load_small(name: str, **settings: Any) -> florence2.Florence2:
        assert name == "base"
        return load(small_folder, **settings)

    monkeypatch.setattr(florence2, "load", load_small)
    names: dict[str, Any] = {}
    exec(compile(PYTHON[block], f"README.md, block {block}", "exec"), names)
    for expression, dimensions in stated_shapes(PYTHON[block]):
        shape = eval(expression, names).shape
        assert len(shape) == len(dimensions), f"{expression} is {tuple(shape)}"
        for size, dimension in zip(shape, dimensions, strict=True):
            assert not dimension.isdigit() or size in sizes_like(dimension, names["f"]), f"{expression}: {tuple(shape)}"


def stated_shapes(block: str) -> list[tuple[str, list[str]]]:
    """Every `expression  # (a, b, c)` and `name = ...  # (a, b, c)` of a block."""
    lines = re.findall(r"^ *(?:(\w+) = )?(.+?)  # \((.*?,.*?)\)", block, re.M)
    return [(name or expression, dimensions.split(", ")) for name, expression, dimensions in lines]


def sizes_like(dimension: str, f: florence2.Florence2) -> set[int]:
    """What a number of base's shapes is in the model `f`: its sides, image tokens, or width."""
    height, width = f.processor.image_config.height, f.processor.image_config.width
    config = f.model.config
    base = {"1": {1}, "3": {3}, "577": {config.vision.image_tokens(height, width)}}
    return base.get(dimension) or {height, width, config.text.d_model}


def test_the_shapes_are_those_of_base() -> None:
    config = preset("base")
    (pixels, features, memory, *_) = [shape for block in PYTHON for _, shape in stated_shapes(block)]
    tokens, width = config.vision.image_tokens(768, 768), config.text.d_model
    assert pixels == ["1", "3", "768", "768"] and features == ["1", str(tokens), str(width)]
    assert memory == ["1", f"{tokens} + T", str(width)]


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


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "weights").rglob("*.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
