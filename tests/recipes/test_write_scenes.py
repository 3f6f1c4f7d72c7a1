"""Made-up data sets: what is written is read by the trainer, and is what was asked for."""

import json
from pathlib import Path

import pytest

from florence2.inputs.image import open_image
from florence2.train.sources import read_samples
from recipes.nano.scene_tasks import SCENE_TASKS
from recipes.nano.scenes import Scene, Thing, make_scene
from recipes.nano.write_scenes import SIZES_QUESTION, main, sizes


def test_every_question_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "d"), "--seed", "3", "--count", "4", "--ask", *SCENE_TASKS, "sizes"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'd' / 'data.jsonl'}\n"
    samples = read_samples(tmp_path / "d", questions_per_image=99)
    assert len(samples) == 4
    for index, sample in enumerate(samples):
        scene = make_scene(3, index)
        assert open_image(sample.image).tobytes() == scene.image.tobytes()
        assert dict(sample.pairs)[SIZES_QUESTION] == sizes(scene)
        assert len(sample.pairs) >= len(SCENE_TASKS) - 3  # where nothing is printed, nothing is read


def test_the_same_seed_writes_the_same(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main([str(tmp_path / name), "--seed", seed, "--count", "2", "--ask", "<OD>", "<REGION_TO_CATEGORY>"])
    a, b, c = (sorted(path.read_bytes() for path in (tmp_path / name).iterdir()) for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count is 0; it must be at least 1."),
        (["--ask", "<NOPE>"], "Unknown task <NOPE>. Known tasks: sizes, <OCR>,"),
        (["--ask", "<OD>", "counting"], "Unknown task counting. Known tasks: sizes, <OCR>,"),
    ],
)
def test_what_cannot_be_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "d"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_sizes() -> None:
    scene = make_scene(0, 0)
    corners = ((0, 0), (1, 0), (1, 1))
    rows = [("red", "circle", "large"), ("blue", "word", "small"), ("white", "digit 7", "large")]
    things = tuple(Thing(color, category, size, "plain", corners) for color, category, size in rows)
    assert sizes(Scene(scene.image, "beige", things)) == "large: red circle, white digit 7; small: blue word"
    assert sizes(Scene(scene.image, "beige", things[1:2])) == "large: none; small: blue word"
    assert sizes(Scene(scene.image, "beige", things[:1])) == "large: red circle; small: none"


def test_lines_are_plain_json(tmp_path: Path) -> None:
    main([str(tmp_path), "--count", "3", "--ask", "<CAPTION>"])
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [sorted(row) for row in rows] == [["image", "prefix", "suffix"]] * 3
