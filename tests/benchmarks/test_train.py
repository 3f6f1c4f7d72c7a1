"""`python -m benchmarks train` on a tiny model, and the arithmetic of its table."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.train import Contest, Training, _rows, _without_dropout, format_contests


@pytest.mark.release
def test_this_trainer_alone_and_its_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two updates of one image by each: the losses are equal, and the table has a row."""
    pytest.importorskip("transformers")
    words = "train --shape nano --kinds frozen --steps 2 --batch 1 --threads 1".split()
    files = {name: str(tmp_path / name) for name in ("t.md", "t.json")}
    assert main([*words, "--output", files["t.md"], "--json", files["t.json"]]) == 0
    table = capsys.readouterr().out
    assert "The losses of all updates are equal up to rounding." in table
    assert (tmp_path / "t.md").read_text() == table.rstrip("\n") + "\n"
    (contest,) = json.loads((tmp_path / "t.json").read_text())["contests"]
    for engine in ("native", "ours"):
        run = contest[engine]
        assert (len(run["losses"]), len(run["seconds"]), len(run["processor"]), len(run["first"])) == (2, 1, 1, 1)
        assert 1e8 < run["peak"] < 5e9 and run["seconds"][0] > 0


def contest(native: list[float], ours: list[float], losses: tuple[float, float] = (2.0, 2.0)) -> Contest:
    """One update each."""
    one, two = (Training([loss], seconds, seconds, [9.0], peak) for loss, seconds, peak in (
        (losses[0], native, 2 << 20), (losses[1], ours, 1 << 20)
    ))  # fmt: skip
    return Contest("full", one, two)


def test_ratios_are_those_of_the_updates() -> None:
    """The machine was slower from update to update."""
    one = contest([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert one.speed() == 2.0 == one.processor()
    row = [cell.strip() for cell in format_contests([one], 4).splitlines()[-1].split("|")[1:-1]]
    assert row[:6] == ["all parameters", "4", "2", "2", "2.00x", "2.00x"]
    assert row[6:] == ["2", "1", "0.50x", "9 s, 9 s", "0.0e+00"]


def test_losses_that_differ_are_noticed() -> None:
    assert contest([1.0], [1.0], (2.0, 2.1)).difference() == pytest.approx(0.05)


def test_the_first_update_of_each_round_is_apart() -> None:
    training = Training()
    for seconds in (50.0, 1.0, 2.0):
        training.add({"loss": 1.0, "seconds": seconds, "processor": seconds})
    training.end_round(3, 100)
    for seconds in (60.0, 3.0, 4.0):
        training.add({"loss": 1.0, "seconds": seconds, "processor": seconds})
    training.end_round(3, 90)
    assert training.first == [50.0, 60.0] and training.peak == 100 and len(training.losses) == 6
    assert training.seconds == training.processor == [1.0, 2.0, 3.0, 4.0]


def test_every_rate_of_dropout_is_set_to_zero() -> None:
    config = {"dropout": 0.1, "vision_config": {"drop_path_rate": 0.1, "depths": [1]}, "text_config": {"dropout": 0.2}}
    assert _without_dropout(config) == {
        "dropout": 0.0, "vision_config": {"drop_path_rate": 0.0, "depths": [1]}, "text_config": {"dropout": 0.0}
    }  # fmt: skip


def test_answers_differ_in_length(tmp_path: Path) -> None:
    rows = _rows(8, 8, tmp_path)
    assert sorted(answer.count("circle") for _, _, answer in rows) == list(range(1, 9))
    assert len({Path(image).read_bytes() for image, _, _ in rows}) == 8


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--steps 1", "--steps is 1; it must be at least 2."),
        ("--batch 4 --images 3", "--images is 3; it must be at least --batch, 4."),
    ],
)
def test_what_cannot_be_meant(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words.split()]) == 2
    assert capsys.readouterr().err == f"benchmarks: {sentence}\n"
