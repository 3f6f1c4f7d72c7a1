"""The shipped specimen, whose answers mean something: what is drawn is found where it was drawn."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import florence2
from florence2.answers.answer import Answer
from florence2.checkpoints.hub import resolve
from florence2.inputs.tasks import TASKS
from florence2.pipeline import Florence2
from recipes.nano.scene_tasks import SCENE_TASKS, ask
from recipes.nano.scenes import make_scene
from recipes.nano.train import write_processor

SCENES = [make_scene(77, index) for index in range(2)]


@pytest.fixture(scope="module")
def nano() -> Florence2:
    return florence2.load("nano")


@pytest.fixture
def drawing() -> Image.Image:
    """A red circle on the left and a blue square on the right, drawn here by hand."""
    image = Image.new("RGB", (300, 240), (208, 208, 208))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 70, 120, 160), fill=(214, 32, 38))
    draw.rectangle((190, 60, 270, 140), fill=(34, 70, 206))
    return image


def iou(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return float(inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside))


def test_a_red_circle_is_found_where_it_was_drawn(nano, drawing) -> None:
    answer = nano.run("<OD>", drawing)
    assert [box.label for box in answer.boxes] == ["circle", "square"]
    assert iou(answer.boxes[0].xyxy, (30, 70, 120, 160)) > 0.7
    assert iou(answer.boxes[1].xyxy, (190, 60, 270, 140)) > 0.7
    assert all(0 < box.score <= 1 for box in answer.boxes)


def test_the_caption_names_both(nano, drawing) -> None:
    assert nano.caption(drawing).text == "a red circle and a blue square"


def test_a_phrase_is_grounded(nano, drawing) -> None:
    boxes = nano.ground(drawing, "a blue square").boxes
    assert [box.label for box in boxes] == ["a blue square"] and iou(boxes[0].xyxy, (190, 60, 270, 140)) > 0.7


def test_a_region_is_named(nano, drawing) -> None:
    assert nano.run("<REGION_TO_CATEGORY>", drawing, (28, 68, 122, 162)).text == "circle"


def test_the_cascade_outlines_what_the_caption_names(nano, drawing) -> None:
    found = nano.cascade(drawing)
    assert found.caption.text == "a red circle and a blue square"
    assert [box.label for box in found.grounding.boxes] == ["a red circle", "a blue square"]
    assert [len(segment.polygons) for segment in found.segments] == [1, 1]


def questions() -> list[tuple[str, Image.Image]]:
    asked = [(ask(task, scene, random.Random(1)), scene) for scene in SCENES for task in SCENE_TASKS]
    return [(question.prefix, scene.image) for question, scene in asked if question is not None]


@pytest.fixture(scope="module")
def singles(nano) -> list[Answer]:
    return [nano.run(prompt, image) for prompt, image in questions()]


@pytest.mark.release
def test_a_batch_equals_singles_over_all_tasks(nano, singles) -> None:
    wanted = questions()
    assert {prompt[: prompt.index(">") + 1] for prompt, _ in wanted} == set(TASKS)
    together = nano.run_batch(wanted, batch_size=8)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in singles]
    assert all(answer.finish_reason == "stop" for answer in singles)


@pytest.mark.release
def test_every_task_answers_in_its_own_form(singles) -> None:
    for answer in singles:
        filled = {"text": answer.text, "quads": answer.quads, "polygons": answer.polygons}
        assert filled.get(answer.kind, answer.boxes), answer.task


@pytest.mark.release
def test_the_command_line_needs_no_network(tmp_path: Path, drawing) -> None:
    drawing.save(tmp_path / "drawing.png")
    command = [sys.executable, "-m", "florence2", "run", "<OD>", str(tmp_path / "drawing.png"), "--model", "nano"]
    command += ["--json", "--out", str(tmp_path / "out"), "--draw"]
    offline = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=offline)
    assert done.returncode == 0, done.stderr
    assert [box["label"] for box in json.loads(done.stdout)["boxes"]] == ["circle", "square"]
    assert len(list((tmp_path / "out").glob("*.png"))) + len(list((tmp_path / "out").glob("*.jpg"))) == 1


@pytest.mark.release  # it trains a tokenizer
def test_its_tokenizer_and_settings_are_those_of_the_recipe(tmp_path: Path) -> None:
    write_processor(tmp_path)
    shipped, made = (
        {name: json.loads((folder / name).read_text()) for name in ("tokenizer.json", "preprocessor_config.json")}
        for folder in (resolve("nano"), tmp_path)
    )
    assert shipped == made
    settings = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (resolve("nano"), tmp_path)]
    assert settings[0].items() <= settings[1].items()


def test_it_is_small_and_complete() -> None:
    folder = resolve("nano")
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= files.keys()
    assert sum(files.values()) <= 12e6
