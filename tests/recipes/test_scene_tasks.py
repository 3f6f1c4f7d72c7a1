"""Questions about scenes are ones that the model's own parser and prompt checks accept."""

import random

import pytest

from florence2.answers.answer import parse_answer
from florence2.inputs.tasks import TASKS, check_prompt
from recipes.nano.scene_tasks import SCENE_TASKS, ask, caption, place
from recipes.nano.scenes import Scene, make_scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(21, index) for index in range(40)]


def test_every_task_is_asked() -> None:
    assert set(SCENE_TASKS) == set(TASKS)


@pytest.mark.parametrize("task", SCENE_TASKS)
def test_answers_say_what_is_there(task: str, scenes: list[Scene]) -> None:
    asked = 0
    for index, scene in enumerate(scenes):
        found = ask(task, scene, random.Random(index))
        if found is None:
            assert not any(thing.text for thing in scene.things)
            continue
        check_prompt(found.prefix)
        answer = parse_answer(task, TASKS[task].answer, f"</s><s>{found.suffix}</s>", scene.image.size)
        regions = [*answer.boxes, *answer.quads, *answer.polygons]
        assert TASKS[task].answer == "text" or len(regions) == len(found.things)
        for box, thing in zip(answer.boxes, found.things, strict=False):
            assert box.xyxy == pytest.approx(thing.box, abs=0.4)
        asked += 1
    assert asked > 20


def test_a_caption_names_all(scenes: list[Scene]) -> None:
    scene = max(scenes, key=lambda scene: len(scene.things))
    for thing in scene.things:
        assert f"{thing.color} {thing.category}" in caption(scene.things)


def test_places_are_thirds(scenes: list[Scene]) -> None:
    seen = {place(thing, scene) for scene in scenes for thing in scene.things}
    assert seen == {
        *("at the top left", "at the top", "at the top right", "on the left", "in the center", "on the right"),
        *("at the bottom left", "at the bottom", "at the bottom right"),
    }
