"""Commands and examples of README and docs, run as they stand there."""

import importlib
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import florence2
from florence2.bulk.questions import check_order, read_questions
from florence2.checkpoints.presets import preset
from florence2.cli import main as cli
from florence2.cli.run import split_arguments
from florence2.inputs.tasks import TASKS, TaskTable, find_task, token_task
from florence2.train.sources import read_samples

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATED = ("reference/command-line.md",)
"""Pages that only the site has."""
GUIDES = ("answers", "inspecting")
"""Pages of docs/ whose Python blocks ask base."""
ELSEWHERE = {
    "docs/confidence.md": "tests/interop/test_supervision.py",
    "docs/labelling-sources.md": "tests/docs/test_pages.py",
    "docs/lite.md": "tests/lite/test_guide.py",
    "docs/modifying.md": "tests/test_modifying.py",
    "docs/onnx.md": "tests/clients/test_openvino.py",
}
"""Pages with other blocks, and the tests that run them."""
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "weights").rglob("*.md")),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PYTHON = [
    pytest.param(block, id=f"{name_of(page)} {number}")
    for page in (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES))
    for number, block in enumerate(blocks(page, "python"), 1)
]
SHELL = [
    (page, re.split(r"\s#\s", line)[0].strip())
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = [
    pytest.param(line, id=f"{name_of(page)}: {line[:50]}") for page, line in SHELL if line.startswith("florence2 ")
]


@pytest.mark.parametrize("block", PYTHON)
def test_python(block: str, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself, with the small checkpoint in place of base; shapes in its comments hold for both."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    load = florence2.load

    def load_small(name: str, **settings: Any) -> florence2.Florence2:
        assert name == "base"
        return load(small_folder, **settings)

    monkeypatch.setattr(florence2, "load", load_small)
    names: dict[str, Any] = {}
    exec(compile(block, "a block of the documentation", "exec"), names)
    for expression, dimensions in stated_shapes(block):
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
    config, page = preset("base"), ROOT / "docs" / "answers.md"
    (pixels, features, memory, *_) = [shape for block in blocks(page, "python") for _, shape in stated_shapes(block)]
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
    (command,) = [line for page, line in SHELL if page.name == "README.md" and " -m pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_page_of_tasks_has_all_published_ones() -> None:
    page = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    rows = {token: row for row in page.splitlines() if row.startswith("| `<") for token in re.findall(r"<\w+>", row)}
    assert rows.keys() == TASKS.keys()
    for token, row in rows.items():
        takes = row.split("|")[2].strip()
        assert (TASKS[token].takes == "region") == (takes == "a box") and (TASKS[token].takes == "nothing") == (
            not takes
        )


def test_the_forms_of_training_data_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (200, 200)).save(tmp_path / "a.jpg")
    (block,) = blocks(ROOT / "docs" / "own-data.md", "json")
    (tmp_path / "data.jsonl").write_text(block)
    tasks = TaskTable([token_task("<VQA>")])
    (sample, more) = read_samples(tmp_path / "data.jsonl", known=tasks)
    assert len(sample.pairs + more.pairs) == len(block.splitlines()) == 6
    for pair in sample.pairs + more.pairs:
        assert find_task(pair[0], tasks) is not None


def test_the_lines_for_ray_are_those_of_the_program() -> None:
    (block,) = blocks(ROOT / "docs" / "labelling-sources.md", "python")
    program = (ROOT / "docs" / "ray_label.py").read_text(encoding="utf-8")
    assert textwrap.indent(block, "    ") in program


def test_every_python_block_is_run_by_a_test() -> None:
    with_blocks = {name_of(page) for page in PAGES if blocks(page, "python")}
    guides = {f"docs/{name}.md" for name in GUIDES} | {"README.md"}
    chapters = {name for name in with_blocks if name.startswith("docs/how-it-works/")}  # test_book.py
    assert with_blocks - guides - chapters == set(ELSEWHERE)
    for page, test in ELSEWHERE.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text(encoding="utf-8")


def test_the_readme_is_a_front_door() -> None:
    assert len(README.split()) <= 850


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|srcset)="([^":]+)"', text)
    for target in targets:
        assert target in GENERATED or (page.parent / target).exists(), target
