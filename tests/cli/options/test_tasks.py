"""Tasks of a command line: their order, and those that only a model's files know."""

import argparse
from pathlib import Path

import pytest

from florence2.checkpoints.hub import resolve
from florence2.cli.main import main
from florence2.cli.options import tasks


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_swapped_arguments_get_the_order_that_works(
    command: str, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(picture_file), "<OD>"]) == 2
    right = f"The task comes before the image: florence2 {command} '<OD>' {picture_file}"
    assert right in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "adapter", "word", "fetched"),
    [
        ("nano", None, "depth", False),
        ("nano", "./missing", "od", False),
        ("nano", "./missing", "depth", True),
        ("base", None, "<DEPTH>", False),
        ("owner/unknown", None, "How deep?", False),
        ("owner/unknown", None, "depth", True),
        ("owner/unknown", None, "<DEPTH>", True),
    ],
)
def test_files_that_may_bring_a_task_are_fetched_for_a_word_that_may_be_one(
    model: str, adapter: str | None, word: str, fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(tasks, "check_model", lambda given: calls.append(given.model))
    monkeypatch.setattr(tasks, "find_checkpoint", lambda name, *_: resolve(name) if name == "nano" else None)
    given = argparse.Namespace(model=model, adapter=adapter, revision=None, task_kind=[])
    assert len(tasks.model_tasks(given, ["Is it far?", word]).own) == 0 and bool(calls) == fetched
