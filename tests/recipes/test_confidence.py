"""The comparison of formulas, on few scenes, and what spoils scenes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

import florence2
from florence2.checkpoints.checks.calibration import read_calibration
from florence2.train.calibrate import separation
from recipes.nano import calibrate, confidence_by_task
from recipes.nano.confidence import CHOSEN, CLEAN_SEED, SPOILT_SEED, _areas, _even_error, format_tables, main, measure
from recipes.nano.exam import Exam
from recipes.nano.scene_tasks import SCENE_TASKS
from recipes.nano.scenes import make_scene
from recipes.nano.spoiling import SPOILT, spoil


def test_scenes_are_spoilt_the_same_way_every_time() -> None:
    image = make_scene(3, 1).image
    spoilt = [spoil(image, random.Random(seed)) for seed in range(12)]
    again = [spoil(image, random.Random(seed)) for seed in range(12)]
    assert [one.tobytes() for one in spoilt] == [one.tobytes() for one in again]
    assert all(one.size == image.size and one.mode == "RGB" for one in spoilt)
    assert sum(one.tobytes() != image.tobytes() for one in spoilt) > 8  # a cover may hide nothing but background
    assert {random.Random(seed).choice(SPOILT) for seed in range(12)} == {*SPOILT}


@pytest.mark.release
def test_the_formula_of_the_package_is_the_one_by_hand() -> None:
    """The table's own computation, by `decode` and other code, gives the confidence of each box and quad."""
    f = florence2.load("nano", device="cpu")
    measured = {"clean": measure(f, CLEAN_SEED, 3), "spoilt": measure(f, SPOILT_SEED, 3)}
    for values in measured.values():
        assert values["found"] and len(values["truths"]) == 3
        for each in values["found"]:
            by_hand = each["values"]["label x least near 50 %"], each["values"]["label x all near 5 bins"]
            assert by_hand[1] - 1e-5 <= each["values"][CHOSEN] <= by_hand[0] + 1e-5
            assert each["values"][CHOSEN] <= each["values"]["label"] + 1e-5
            assert each["values"][CHOSEN] == pytest.approx(
                each["values"]["label"] * each["values"]["least near 4 bins + 4 %"], abs=1e-4
            )
    table = format_tables(f, measured)
    assert "calibrated**" in table and table.count(f"| {CHOSEN} |") == 3


def test_the_area_of_scenes_that_are_drawn_again_is_that_of_repeated_regions() -> None:
    values, right = [0.9, 0.4, 0.4, 0.2, 0.7, 0.1], [True, True, False, False, False, True]
    counts = np.array([[1, 1, 1, 1, 1, 1], [2, 0, 1, 3, 1, 1], [1, 1, 0, 0, 0, 1]])
    expected = []
    for row in counts[:2]:
        again = [i for i, count in enumerate(row) for _ in range(count)]
        expected.append(separation([values[i] for i in again], [right[i] for i in again]))
    found = _areas(values, right, counts)
    assert found[:2].tolist() == pytest.approx(expected) and np.isnan(found[2])


def test_the_error_over_parts_of_equally_many_answers() -> None:
    """Ten parts of two: all are right, so each part is off by what its confidences lack."""
    confidences = [0.9 + i / 200 for i in range(20)]
    assert _even_error(confidences, [True] * 20) == pytest.approx(1 - sum(confidences) / 20)
    assert _even_error([0.5] * 20, [i % 2 > 0 for i in range(20)]) == 0
    assert _even_error([0.5 + i / 100 for i in range(20)][::-1], [i < 10 for i in range(20)]) == pytest.approx(0.45)


def test_values_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "values.json"
    assert main(["--scenes", "2", "--keep", str(kept)]) == 0
    first = capsys.readouterr().out
    assert json.loads(kept.read_text()) and main(["--keep", str(kept)]) == 0
    assert capsys.readouterr().out == first


def test_regions_of_spoilt_scenes_count_no_more_than_those_of_clean_ones() -> None:
    clean = {"boxes": [(0.9, True)] * 3, "text": [(0.8, True)], "<OD>": [(0.9, True)] * 5, "quads": [(0.7, True)]}
    spoilt = {
        "boxes": [(0.2, False)] * 9,
        "text": [(0.1, False)] * 2,
        "<OD>": [(0.2, True)] * 4,
        "<OCR>": [(0.3, True)],
    }
    joined = calibrate.join(clean, spoilt)
    assert joined["boxes"] == [(0.9, True)] * 3 + [(0.2, False)] * 3 and len(joined["<OD>"]) == 9
    outlines = {"<REGION_TO_SEGMENTATION>": [(0.5, True)]}, {"<REGION_TO_SEGMENTATION>": [(0.4, True)] * 2}
    assert len(calibrate.join(*outlines)["<REGION_TO_SEGMENTATION>"]) == 3  # one outline for a scene, as with texts
    assert len(joined["text"]) == 3 and joined["quads"] == [(0.7, True)] and joined["<OCR>"] == [(0.3, True)]


@pytest.mark.release  # a whole fit
def test_a_calibration_is_fitted_to_half_spoilt_scenes_and_measured_on_every_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exam = Exam(3, 12, spoilt=0.5)
    changed = sum(exam[i].image.tobytes() != exam.scene(i).image.tobytes() for i in range(len(exam)))
    assert 2 < changed < 10 and changed <= sum(map(exam.is_spoilt, range(12)))  # a cover may hide nothing
    assert not any(exam[i].image.tobytes() != exam.scene(i).image.tobytes() for i in range(12) if not exam.is_spoilt(i))
    assert not any(Exam(3, 4)[i].image.tobytes() != exam.scene(i).image.tobytes() for i in range(4))

    assert calibrate.main([str(tmp_path / "own.json"), "--scenes", "14"]) == 0
    own = read_calibration(tmp_path / "own.json")
    assert own.knows("boxes") and not own.knows("<CAPTION>")  # fourteen captions are too few for a table
    f = florence2.load("nano", device="cpu", calibration=own)
    rated = [("<OD>", [(0.2, False), (0.9, True)])]
    table = confidence_by_task.format_table(f, [dict(rated), {}]).splitlines()
    assert len(table) == 2 + len(SCENE_TASKS)
    fitted = [own(raw, "<OD>", "boxes") for raw in (0.2, 0.9)]
    error = (fitted[0] + 1 - fitted[1]) / 2
    row = next(line for line in table if "`<OD>`" in line)
    assert row.startswith(f"| `<OD>` | 1 of 2 | 1.000 | 0.150 | {error:.3f} | 0 of 0 | – |")
