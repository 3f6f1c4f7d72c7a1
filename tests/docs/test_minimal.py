"""docs/florence2_minimal.py writes the package's tokens, and stays one short file without it."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import florence2
from florence2.answers.answer import Answer
from florence2.checkpoints.presets import preset
from florence2.inputs.tasks import _PUBLISHED
from florence2.inputs.tokenizer_file import ADDED_TOKENS
from florence2.pipeline import Florence2
from parity.recipe import GOLDEN, make_checkpoint, make_picture
from recipes.nano.exam import Exam
from recipes.nano.scene_tasks import SCENE_TASKS
from tests.conftest import copy_native
from tests.release import keep

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "florence2_minimal.py"
NANO = ROOT / "weights" / "nano"
THIRD_PARTY = {"torch", "safetensors", "tokenizers", "PIL", "numpy"}
SEED, SCENES = 23, 8


def load_minimal() -> Any:
    spec = importlib.util.spec_from_file_location("florence2_minimal", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


minimal = load_minimal()


def test_it_is_short_and_needs_nothing_else() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == THIRD_PARTY


def test_tasks_and_tokens_are_the_published_ones() -> None:
    kinds = {"proposals": "boxes", "phrases": "boxes", "boxes_or_polygons": "boxes"}
    written = {
        t.token: (t.sentence.replace("{input}", "{}"), kinds.get(t.answer, t.answer)) for t in _PUBLISHED.values()
    }
    assert written == minimal.TASKS
    assert tuple(minimal.ADDED) == ADDED_TOKENS


@pytest.fixture(scope="module")
def nano() -> Florence2:
    return florence2.load("nano", device="cpu")


@pytest.fixture(scope="module")
def checkpoint() -> Any:
    return minimal.load(NANO)


def questions(exam: Exam) -> Iterator[tuple[Image.Image, str]]:
    for index in range(len(exam)):
        sample = exam[index]
        yield from ((sample.image, prefix) for prefix, _ in sample.pairs)


@pytest.mark.parametrize("first", keep([0], range(7)))
def test_it_answers_as_the_package_does(nano: Florence2, checkpoint: Any, first: int) -> None:
    """Ids, text, labels and places, written from the first token to the last, for every task."""
    for image, prefix in list(questions(Exam(SEED, 1)))[first::7]:
        expected = nano.run(prefix, image, num_beams=1, confidence=False)
        ids, text, shapes = minimal.answer(checkpoint, prefix, image)
        assert ids == list(expected.token_ids), prefix
        assert text == expected.text
        assert [label for label, _ in shapes] == [label for label, _ in shapes_of(expected)]
        for (_, pixels), (_, places) in zip(shapes, shapes_of(expected), strict=True):
            assert pixels == pytest.approx(places, abs=1e-3)


def shapes_of(answer: Answer) -> list[tuple[str, list[float]]]:
    boxes = [(box.label, list(box.xyxy)) for box in answer.boxes]
    quads = [(quad.label, list(quad.xyxyxyxy)) for quad in answer.quads]
    return [*boxes, *quads, *((polygon.label, list(ring)) for polygon in answer.polygons for ring in polygon.rings)]


@pytest.mark.release
def test_eight_scenes_and_all_tasks(nano: Florence2, checkpoint: Any) -> None:
    """The package's greedy tokens are those that the file would write.

    If a file's first t tokens are the package's, then its next one is the likeliest after them. Nothing looks ahead,
    so one pass over the whole answer shows the likeliest after every t.
    """
    asked = list(questions(Exam(SEED, SCENES)))
    assert {prefix.partition(">")[0] + ">" for _, prefix in asked} == set(SCENE_TASKS) and len(asked) > 14 * SCENES
    requests = [(prefix, image) for image, prefix in asked]
    answers = list(nano.run_batch(requests, num_beams=1, confidence=False, batch_size=32))
    wrong = [
        a.raw_text
        for (image, prefix), a in zip(asked, answers, strict=True)
        if not is_greedy(checkpoint, a, image, prefix)
    ]
    assert wrong == []


_seen: dict[int, torch.Tensor] = {}


@torch.no_grad()
def is_greedy(checkpoint: Any, answer: Answer, image: Image.Image, prefix: str) -> bool:
    model, tokenizer, settings = checkpoint
    token, task_input = prefix.partition(">")[0] + ">", prefix.partition(">")[2]
    prompt = tokenizer.encode(minimal.TASKS[token][0].format(task_input)).ids
    if id(image) not in _seen:  # the images of all questions are alive, so no two have one id
        _seen[id(image)] = model.projection(model.vision_tower(minimal.to_pixels(image, settings)))
    memory = model.encoder(torch.cat([_seen[id(image)], model.shared(torch.tensor([prompt]))], dim=1))
    ids = list(answer.token_ids)
    likeliest = model.decode(torch.tensor([ids[:-1]]), memory)[0].argmax(dim=-1).tolist()
    return [minimal.END, minimal.BOS, *likeliest[1:]] == ids


def test_one_wrong_token_would_be_noticed(nano: Florence2, checkpoint: Any) -> None:
    image, prefix = next(questions(Exam(SEED, 1)))
    answer = nano.run(prefix, image, num_beams=1)
    assert is_greedy(checkpoint, answer, image, prefix)
    ids = (*answer.token_ids[:3], answer.token_ids[3] + 1, *answer.token_ids[4:])
    assert not is_greedy(checkpoint, replace(answer, token_ids=ids), image, prefix)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published shape scaled down: four stages, 51,289 tokens, and a limit that cuts answers."""
    tiny = preset("tiny")
    config = replace(tiny, text=replace(tiny.text, max_position_embeddings=64))
    folder = tmp_path_factory.mktemp("minimal") / "microsoft"
    make_checkpoint(folder, config, seed=21, end_bonus=16.5, size=(192, 192))
    return folder


@pytest.mark.release
@pytest.mark.parametrize("layout", ["microsoft", "native"])
def test_the_published_shape_scaled_down(synthetic: Path, layout: Any, tmp_path: Path) -> None:
    """With the n-gram rule, under both layouts' names, to an end of the model's own and to the limit."""
    folder = synthetic
    if layout == "native":  # which has no place for final_logits_bias
        folder = copy_native(synthetic, tmp_path)
    f, checkpoint = florence2.load(folder, device="cpu"), minimal.load(folder)
    reasons = set()
    for seed, task in enumerate(("<CAPTION>", "<OD>", "<OCR_WITH_REGION>", "<OPEN_VOCABULARY_DETECTION>a green car")):
        image = make_picture(seed, 320, 200)
        expected = f.run(task, image, num_beams=1)
        assert minimal.answer(checkpoint, task, image)[0] == list(expected.token_ids), task
        reasons.add(expected.finish_reason)
    assert reasons == ({"length", "stop"} if layout == "microsoft" else {"length"})


@pytest.mark.parametrize("record", ["base-microsoft", "base-native", "large-microsoft"])
def test_published_files_have_every_weight(record: str) -> None:
    """Their recorded names and shapes, without their values."""
    published = json.loads((GOLDEN / "state_dicts.json").read_text())[record]
    configs = json.loads((GOLDEN / "configs.json").read_text())
    shapes: dict[str, list[int]] = {}
    for stored, shape in published.items():
        name = stored
        for pattern, replacement in minimal.NAMES:
            name = re.sub(pattern, replacement, name)
        shapes[name] = shape[::-1] if stored == "image_projection" else shape
    with torch.device("meta"):
        model = minimal.Florence2(configs[record.split("-")[0]])
    for name, tensor in model.state_dict().items():
        if name == "final_logits_bias" and record == "base-native":
            assert name not in shapes  # zeros take its place
        else:
            rows = slice(1, None) if name == "shared.weight" else slice(None)  # native tables have spare rows
            assert list(tensor.shape)[rows] == shapes.pop(name)[rows], name
    assert [name for name in shapes if not name.startswith(("shared", "multi", "visual"))] == []


def test_repeats_is_the_rule_of_n_grams() -> None:
    assert minimal.repeats([2, 0, 5, 6, 7, 5, 6], 3) == [7]
    assert minimal.repeats([2, 0, 5, 6, 7, 5, 6], 2) == [7]
    assert minimal.repeats([2, 0, 5, 5], 1) == [2, 0, 5, 5]
    assert minimal.repeats([2, 0, 5, 6, 7, 5, 6], 0) == [] == minimal.repeats([2], 3)


def test_polygons_have_outlines() -> None:
    text = "<poly><loc_0><loc_0><loc_9><loc_0><loc_9><loc_9><sep><loc_1><loc_2><loc_3><loc_4></poly>"
    (_, first), (_, second) = minimal.find_shapes("boxes", text, 1000, 2000)
    assert first == [0.5, 1, 9.5, 1, 9.5, 19] and second == [1.5, 5, 3.5, 9]
    assert minimal.find_shapes("text", "a<loc_1><loc_2><loc_3><loc_4>", 100, 100) == []


@pytest.mark.release
def test_the_command() -> None:
    words = [sys.executable, FILE, NANO, "<OD>", ROOT / "docs" / "scene.png"]
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    assert run.stderr == "" and run.stdout.splitlines()[0].startswith("digit 5: 18.3 113.4 ")
