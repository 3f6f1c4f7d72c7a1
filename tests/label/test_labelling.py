"""A run at its ends: a stop, too many errors, no room for putting the rows in order."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import florence2
from florence2.bulk.answering import Rows
from florence2.cli.options.arguments import load_model
from florence2.errors import ImageError, OutputError
from florence2.label.ahead import Taken
from florence2.label.errors import ErrorLimit
from florence2.label.journal import Journal
from florence2.label.labelling import Labelling
from florence2.label.remaining import Remaining
from tests.bulk.conftest import stop_after
from tests.label.conftest import ASKED, row


class Interrupted(Labelling):
    """A run about four images; Ctrl-C comes before the second has an answer."""

    def _answer(self) -> None:
        self._write(broken_images(stop_after(4)))


def broken_images(ask: Any) -> Rows:
    """The rows of four images that cannot be read."""
    work = [Taken(row(name).source, (ASKED,), None, ImageError("It is broken.")) for name in "abcd"]
    return Rows(florence2.load("nano"), work, ask)


def labelling(journal: Journal, kind: type[Labelling] = Labelling, **options: Any) -> Labelling:
    given = {"max_errors": None, "max_new_tokens": None, "batch": None, "workers": 0, **options}
    return kind(argparse.Namespace(**given), load_model, Remaining([], [ASKED], journal), journal)


def stored(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_stop_writes_the_rows_that_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path, {}) as journal:
        assert labelling(journal, Interrupted).run() == 130
    assert stored(tmp_path) == ["a", "c", "d"]
    assert f"stopped; the rows written so far are kept in {tmp_path / 'results.jsonl'}" in capsys.readouterr().err


def test_too_many_errors_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path, {}) as journal:
        run = labelling(journal, max_errors=ErrorLimit(count=1))
        run._write(broken_images(lambda pairs, arrived: pairs))
    assert stored(tmp_path) == ["a", "b"]
    run._describe()
    assert "ended early, because --max-errors was exceeded" in capsys.readouterr().err


def test_rows_that_cannot_be_put_in_order_are_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OutputError("The disk is full.", "full")

    monkeypatch.setattr("florence2.label.journal.compact", refuse)
    with Journal(tmp_path, {}) as journal:
        assert labelling(journal).run() == 1
    errors = capsys.readouterr().err
    assert "The disk is full. The rows are complete, but not in input order; --compact orders them." in errors


def test_rows_of_other_arguments_are_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With another folder the ids change, and the images are labelled again."""
    with Journal(tmp_path, {}) as journal:
        journal(row("a"))
        assert labelling(journal).run() == 0
    assert "results.jsonl also holds 1 row about other images or questions" in capsys.readouterr().err
    assert stored(tmp_path) == ["a"]


def test_errors_about_images_that_are_gone_are_named_and_taken_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Journal(tmp_path, {}) as journal:
        for each in (row("a"), row("b", None), row("c", None)):
            journal(each)
        assert labelling(journal).run() == 0
        assert "2 errors among them stay too; --compact takes such out." in capsys.readouterr().err
        assert labelling(journal).compact() == 0
    errors = capsys.readouterr().err
    assert "2 errors about images not named here were taken out" in errors and "holds 1 row about" in errors
    assert stored(tmp_path) == ["a"]


def test_only_the_first_errors_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path, {}) as journal:
        run = labelling(journal)
        for number in range(20):
            run._keep(row(f"{number:02}.png", None))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1].endswith("09.png is broken. Further errors are in the rows alone.")
