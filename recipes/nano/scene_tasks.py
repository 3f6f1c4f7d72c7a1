"""Questions of all Florence-2 tasks about synthetic scenes, with the right answers, to train and to measure with."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from florence2.train.targets import boxes_target, location_tokens, polygons_target, quads_target
from recipes.nano.scenes import Scene, Thing


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene: the prompt (`<TASK>` and its input), the answer, and the things it is about."""

    prefix: str
    suffix: str
    things: tuple[Thing, ...]


def ask(task: str, scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """Ask `task` (its token) about `scene`; `rng` chooses the region or phrase where the task needs one.

    Return None when the scene has nothing to ask about, as with `<REGION_TO_OCR>` without text.
    """
    return _ASK[task](scene, rng)


def caption(things: Sequence[Thing]) -> str:
    """Name every thing with its colour, from left to right: "a red circle, a blue star and a green letter K"."""
    return _join([f"{_article(thing.phrase)} {thing.phrase}" for thing in things])


def describe(thing: Thing) -> str:
    """Name size, colour, texture and category: "large red striped circle"."""
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"{thing.size} {thing.color} {texture}{thing.noun}"


def place(thing: Thing, scene: Scene) -> str:
    """Name the third of the image, across and down, that holds the thing's centre: "at the top left"."""
    left, top, right, bottom = thing.box
    width, height = scene.image.size
    column = ("left", "center", "right")[min(int(1.5 * (left + right) / width), 2)]
    row = ("top", "middle", "bottom")[min(int(1.5 * (top + bottom) / height), 2)]
    if row == "middle":
        return "in the center" if column == "center" else f"on the {column}"
    return f"at the {row}" if column == "center" else f"at the {row} {column}"


def _whole(prefix: str, answer: Callable[[Scene], str]) -> Callable[[Scene, random.Random], SceneQuestion]:
    return lambda scene, _: SceneQuestion(prefix, answer(scene), scene.things)


def _detailed(scene: Scene) -> str:
    parts = [f"a {describe(thing)} {place(thing, scene)}" for thing in scene.things]
    return f"The image shows {_join(parts)} on a {scene.background} background."


def _more_detailed(scene: Scene) -> str:
    count = ("no things", "one thing", "two things", "three things", "four things", "five things")[len(scene.things)]
    verb = "is" if len(scene.things) == 1 else "are"
    rows = [f"A {describe(thing)} is {place(thing, scene)}." for thing in scene.things]
    return " ".join([f"There {verb} {count} on a {scene.background} background.", *rows])


def _boxes(scene: Scene, label: Callable[[Thing], str]) -> str:
    return boxes_target([(label(thing), thing.box) for thing in scene.things], scene.image.size)


def _ocr(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    things = tuple(thing for thing in scene.things if thing.text)
    if not things and rng.random() < 0.7:  # sometimes ask anyway: the right answer is then empty
        return None
    return SceneQuestion("<OCR>", " ".join(thing.text for thing in things), things)


def _ocr_with_region(scene: Scene, rng: random.Random) -> SceneQuestion | None:  # noqa: ARG001
    things = tuple(thing for thing in scene.things if thing.text)
    rows = [(thing.text, [value for point in thing.outline for value in point]) for thing in things]
    return SceneQuestion("<OCR_WITH_REGION>", quads_target(rows, scene.image.size), things) if things else None


def _ground(scene: Scene, rng: random.Random) -> SceneQuestion:
    things = scene.things
    if rng.random() < 0.4:
        things = tuple(thing for thing in things if rng.random() < 0.5) or (rng.choice(things),)
    rows = [(f"{_article(thing.phrase)} {thing.phrase}", thing.box) for thing in things]
    prefix = f"<CAPTION_TO_PHRASE_GROUNDING>{caption(things)}"
    return SceneQuestion(prefix, boxes_target(rows, scene.image.size), things)


def _detect(scene: Scene, rng: random.Random) -> SceneQuestion:
    things = scene.things
    if rng.random() < 0.25:  # a category in any colour
        category = rng.choice(things).category
        things = tuple(thing for thing in things if thing.category == category)
        rows = [(category, thing.box) for thing in things]
        return SceneQuestion(f"<OPEN_VOCABULARY_DETECTION>{category}", boxes_target(rows, scene.image.size), things)
    chosen = tuple(thing for thing in things if rng.random() < 0.3) or (rng.choice(things),)
    rows = [(thing.phrase, thing.box) for thing in chosen]
    prefix = "<OPEN_VOCABULARY_DETECTION>" + "<and>".join(thing.phrase for thing in chosen)
    return SceneQuestion(prefix, boxes_target(rows, scene.image.size), chosen)


def _refer(scene: Scene, rng: random.Random) -> SceneQuestion:
    thing = rng.choice(scene.things)
    prefix = f"<REFERRING_EXPRESSION_SEGMENTATION>{_article(thing.phrase)} {thing.phrase}"
    return SceneQuestion(prefix, _outline(thing, scene), (thing,))


def _region(
    task: str, answer: Callable[[Thing, Scene], str], printed: bool = False
) -> Callable[[Scene, random.Random], SceneQuestion | None]:
    def ask_region(scene: Scene, rng: random.Random) -> SceneQuestion | None:
        things = [thing for thing in scene.things if thing.text or not printed]
        if not things:
            return None
        thing = rng.choice(things)
        return SceneQuestion(f"<{task}>{region_of(thing, scene, rng)}", answer(thing, scene), (thing,))

    return ask_region


def region_of(thing: Thing, scene: Scene, rng: random.Random) -> str:
    """Return the location tokens of a box around a thing, off by up to 3 %, as if drawn by hand."""
    left, top, right, bottom = thing.box
    slack_x, slack_y = 0.03 * (right - left), 0.03 * (bottom - top)
    shaken = [
        value + rng.uniform(-slack, slack)
        for value, slack in zip((left, top, right, bottom), (slack_x, slack_y) * 2, strict=True)
    ]
    return location_tokens(shaken, scene.image.size)


def _outline(thing: Thing, scene: Scene) -> str:
    return polygons_target([[value for point in thing.outline for value in point]], scene.image.size)


def with_article(phrase: str) -> str:
    """Return "a red circle" for "red circle"."""
    return f"{_article(phrase)} {phrase}"


def _article(phrase: str) -> str:
    return "an" if phrase.startswith("orange") else "a"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


_ASK: dict[str, Callable[[Scene, random.Random], SceneQuestion | None]] = {
    "<OCR>": _ocr,
    "<OCR_WITH_REGION>": _ocr_with_region,
    "<CAPTION>": _whole("<CAPTION>", lambda scene: caption(scene.things)),
    "<DETAILED_CAPTION>": _whole("<DETAILED_CAPTION>", _detailed),
    "<MORE_DETAILED_CAPTION>": _whole("<MORE_DETAILED_CAPTION>", _more_detailed),
    "<OD>": _whole("<OD>", lambda scene: _boxes(scene, lambda thing: thing.category)),
    "<DENSE_REGION_CAPTION>": _whole("<DENSE_REGION_CAPTION>", lambda scene: _boxes(scene, describe)),
    "<REGION_PROPOSAL>": _whole("<REGION_PROPOSAL>", lambda scene: _boxes(scene, lambda _: "")),
    "<CAPTION_TO_PHRASE_GROUNDING>": _ground,
    "<REFERRING_EXPRESSION_SEGMENTATION>": _refer,
    "<REGION_TO_SEGMENTATION>": _region("REGION_TO_SEGMENTATION", _outline),
    "<OPEN_VOCABULARY_DETECTION>": _detect,
    "<REGION_TO_CATEGORY>": _region("REGION_TO_CATEGORY", lambda thing, _: thing.category),
    "<REGION_TO_DESCRIPTION>": _region("REGION_TO_DESCRIPTION", lambda thing, _: f"a {describe(thing)}"),
    "<REGION_TO_OCR>": _region("REGION_TO_OCR", lambda thing, _: thing.text, printed=True),
}
SCENE_TASKS = tuple(_ASK)
"""The tokens of all tasks that `ask` knows: the fifteen of `florence2.inputs.tasks`."""
