"""The guide's commands, run as they stand there: from a folder of images to a YOLO dataset."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from florence2.cli.main import main
from florence2.dataset.command import build_parser
from florence2.dataset.writing import VIEWS
from recipes.nano.scenes import make_scene
from tests.dataset.rows import caption, write_rows

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "labelling.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.S) for line in block.splitlines()]
FAST = ["--beams", "1", "--workers", "0"]


def run(command: str) -> int:
    words = shlex.split(command)
    if words[0] != "florence2":
        return subprocess.run(command, shell=True, check=False).returncode
    return main(words[1:] + (FAST if words[1] == "label" else []))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_four_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label, look, classes, write = COMMANDS[:4]
    for command in (label, look, classes, write):
        assert run(command) == 0, capsys.readouterr().err
    names = ["cross", "square", "triangle", "word"]
    assert (folder / "classes.txt").read_text().split() == names
    lines = (folder / "dataset/yolo/data.yaml").read_text().splitlines()
    assert lines[1:] == [
        *("train: images/train", "val: images/val", "names:"),
        *(f'  {number}: "{name}"' for number, name in enumerate(names)),
    ]
    rows = [json.loads(line) for line in (folder / "answers/results.jsonl").read_text().splitlines()]
    expected = {
        Path(row["id"]).stem: [
            names.index(box["label"]) for box in row["boxes"] if box["label"] in names and box["confidence"] >= 0.5
        ]
        for row in rows
    }
    labels = {path.stem: path.read_text() for path in (folder / "dataset/yolo/labels").rglob("*.txt")}
    assert {name: [int(line[0]) for line in text.splitlines()] for name, text in labels.items()} == expected
    assert len(expected) == 10 and sum(map(len, expected.values())) >= 8
    images = [path for part in ("train", "val") for path in (folder / "dataset/yolo/images" / part).iterdir()]
    assert sorted(path.stem for path in images) == sorted(labels) and all(path.is_file() for path in images)


def test_captions(folder: Path) -> None:
    label, *write = COMMANDS[4:]
    assert label.startswith("florence2 label docs/scenes --task caption ") and len(write) == 1
    write_rows(folder / "texts", [caption("a.jpg", "a cat")])
    assert run(write[0]) == 0
    assert (folder / "captions/captions/a.txt").read_text() == "ohwx, a cat"


def test_every_format_and_option_is_in_the_guide() -> None:
    assert re.findall(r"^\| `([\w-]+)` \|", GUIDE.split("## Rules")[0], re.M)[1:] == list(VIEWS)
    options = {option for action in build_parser()._actions for option in action.option_strings if option[1] == "-"}
    assert {option for option in options if option not in GUIDE} == {"--help"}


def test_the_images_are_those_of_the_recipe() -> None:
    """`python -m recipes.nano.write_scenes docs/scenes --seed 20 --count 10`."""
    images = sorted((ROOT / "docs" / "scenes").iterdir())
    assert [path.name for path in images] == [f"{index:06}.png" for index in range(10)]
    assert sum(path.stat().st_size for path in images) < 400_000
    for index, path in enumerate(images):
        with Image.open(path) as image:
            difference = ImageChops.difference(image.convert("RGB"), make_scene(20, index).image.convert("RGB"))
        assert max(high for _, high in difference.getextrema()) == 0
