"""Scenes are what they say: the same for a seed, things apart and inside, their pixels in their outlines."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from recipes.nano.scenes import BACKGROUNDS, COLORS, SHAPES, WORDS, Scene, make_scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(11, index) for index in range(60)]


def test_a_seed_gives_the_same_images(scenes: list[Scene]) -> None:
    again = make_scene(11, 7)
    assert again.things == scenes[7].things
    assert again.image.tobytes() == scenes[7].image.tobytes()
    assert make_scene(12, 7).things != scenes[7].things


@pytest.mark.release
def test_everything_is_drawn_somewhere() -> None:
    things = [thing for index in range(150) for thing in make_scene(5, index).things]
    assert {thing.color for thing in things} == set(COLORS)
    assert set(SHAPES) | {"word"} <= {thing.category for thing in things}
    assert len({thing.text for thing in things} & set(WORDS)) > 40
    assert {thing.texture for thing in things} == {"plain", "striped", "dotted"}


@pytest.mark.parametrize("index", range(30))
def test_things_are_inside_apart_and_in_order(index: int, scenes: list[Scene]) -> None:
    scene = scenes[index]
    width, height = scene.image.size
    assert 1 <= len(scene.things) <= 5
    assert [thing.box[0] for thing in scene.things] == sorted(thing.box[0] for thing in scene.things)
    assert len({thing.phrase for thing in scene.things}) == len(scene.things)
    for i, thing in enumerate(scene.things):
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        for other in scene.things[:i]:
            assert left > other.box[2] or other.box[0] > right or top > other.box[3] or other.box[1] > bottom


def test_outlines_hold_the_pixels(scenes: list[Scene]) -> None:
    """Of a plain shape nearly every pixel inside its outline has its colour, and outside nearly none has."""
    checked = 0
    for scene in scenes:
        pixels = np.asarray(scene.image, dtype=np.float32)
        for thing in scene.things:
            if thing.text or thing.texture != "plain":
                continue
            mask = Image.new("1", scene.image.size)
            ImageDraw.Draw(mask).polygon(thing.outline, fill=1)
            inside = np.asarray(mask)
            near = np.linalg.norm(pixels - np.array(COLORS[thing.color]), axis=-1) < 40
            left, top, right, bottom = (int(value) for value in thing.box)
            window = np.zeros_like(inside)
            window[max(top - 3, 0) : bottom + 4, max(left - 3, 0) : right + 4] = True
            overlap = (near & inside).sum() / ((near & window) | inside).sum()
            assert overlap > 0.85, (thing, overlap)
            checked += 1
    assert checked > 20


def test_print_fills_its_quad(scenes: list[Scene]) -> None:
    for scene in scenes:
        pixels = np.asarray(scene.image, dtype=np.float32)
        for thing in scene.things:
            if thing.text:
                near = np.linalg.norm(pixels - np.array(COLORS[thing.color]), axis=-1) < 60
                left, top, right, bottom = thing.box
                rows, columns = np.nonzero(near[int(top) : int(bottom) + 1, int(left) : int(right) + 1])
                assert (
                    len(rows) and np.ptp(rows) > 0.75 * (bottom - top) and np.ptp(columns) > 0.75 * (right - left) - 3
                )


def test_background_names_are_colours_told_apart() -> None:
    values = np.array(list(BACKGROUNDS.values()), dtype=float)
    distances = np.linalg.norm(values[:, None] - values[None], axis=-1)
    assert distances[~np.eye(len(values), dtype=bool)].min() > 25
