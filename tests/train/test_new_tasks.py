"""Tasks that a fine-tune brings, from the data through training to `run` and `evaluate`, by the command line alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import florence2
from florence2.checkpoints.files import read_tasks, write_tasks
from florence2.cli.main import main
from florence2.errors import PromptError
from florence2.inputs.tasks import TASKS, Task, token_task
from florence2.train.sources import find_new_tasks
from parity.recipe import make_picture

Capture = pytest.CaptureFixture[str]
VQA = "<VQA>what colour?"


def write_rows(folder: Path, *rows: tuple[str, str]) -> Path:
    """Write a data file of questions about one image."""
    make_picture(3, 64, 64).save(folder / "scene.png")
    lines = [json.dumps({"image": "scene.png", "prefix": prefix, "suffix": suffix}) for prefix, suffix in rows]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path, (VQA, "red"), ("<VQA>how many?", "two"), ("<GENERATE_TAGS>", "red"), ("<OCR>", "two"))


def florence(*words: object) -> int:
    return main([str(word) for word in words])


def train(rows: Path, model: Path, *words: object) -> int:
    schedule = "--steps 120 --batch 1 --workers 0 --warmup 0 --learning-rate 3e-3 --device cpu"
    return florence("train", rows, "--model", model, "--out", rows.parent / "run", *schedule.split(), *words)


@pytest.mark.release  # it learns four answers
def test_a_fine_tune_from_its_data_to_its_answers(
    rows: Path, mini_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert florence("train", rows, "--model", mini_folder, "--check") == 0
    captured = capsys.readouterr()
    assert "New tasks in the data" in captured.err and "<VQA>, <GENERATE_TAGS>." in captured.err
    assert "<VQA>" in captured.out and "<GENERATE_TAGS>" in captured.out and "free prompt" not in captured.out
    assert train(rows, mini_folder) == 0
    checkpoint = tmp_path / "run" / "checkpoint"
    assert read_tasks(checkpoint) == (token_task("<VQA>"), token_task("<GENERATE_TAGS>"))
    capsys.readouterr()

    chosen = ("--model", checkpoint, "--device", "cpu", "--beams", 1)
    assert florence("evaluate", rows, *chosen, "--json") == 0
    metrics = {row["task"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(metrics) == {"<VQA>", "<GENERATE_TAGS>", "<OCR>"} and metrics["<VQA>"]["count"] == 2
    assert metrics["<VQA>"]["exact_match"] == metrics["<GENERATE_TAGS>"]["exact_match"] == 1.0

    image = tmp_path / "scene.png"
    for task, text in (([VQA], "red"), (["<VQA>", "--text", "how many?"], "two"), (["generate_tags"], "red")):
        assert florence("run", task[0], image, *task[1:], *chosen, "--json") == 0
        row = json.loads(capsys.readouterr().out)
        assert (row["task"], row["text"]) == ("<GENERATE_TAGS>" if "tags" in task[0] else "<VQA>", text)
    assert "<VQA>" not in TASKS and "<VQA>" not in florence2.load(mini_folder).processor.tasks
    with pytest.raises(PromptError, match="Unknown task <VQA>"):
        florence2.load(mini_folder).run(VQA, image)


def test_a_checkpoint_without_the_file_needs_the_option(
    rows: Path, mini_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    image = tmp_path / "scene.png"
    chosen = ("--model", mini_folder, "--device", "cpu", "--beams", 1, "--max-new-tokens", 4)
    assert florence("run", VQA, image, *chosen) == 2
    assert "--task-kind VQA=text" in capsys.readouterr().err
    assert florence("evaluate", rows, *chosen) == 2
    capsys.readouterr()
    kinds = ("--task-kind", "VQA=text", "--task-kind", "<GENERATE_TAGS>=boxes")
    assert florence("run", "vqa", "generate_tags", image, "--text", "why?", *chosen, *kinds, "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["task"], first["kind"], first["input"]) == ("<VQA>", "text", "why?") and second["kind"] == "boxes"
    assert florence("run", "vqa", image, "--box", "1,2,30,40", *chosen, *kinds, "--json") == 0
    assert json.loads(capsys.readouterr().out)["input"] == [1, 2, 30, 40]
    assert florence("evaluate", rows, *chosen, *kinds) == 0
    assert "<VQA>" in capsys.readouterr().out
    assert florence("run", "od", image, *chosen, "--task-kind", "OD=text") == 2
    assert "Task <OD> of this model answers with boxes, but is declared with text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        florence("run", "od", image, *chosen, "--task-kind", "OD=masks")
    assert "answer must be one of text, boxes" in capsys.readouterr().err


def test_inspect_takes_a_declared_task(rows: Path, mini_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert rows.exists()
    chosen = "--task-kind VQA=text --json --no-saliency --device cpu --beams 1 --max-new-tokens 3".split()
    assert florence("inspect", VQA, tmp_path / "scene.png", "--model", mini_folder, *chosen) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert values["task"] == "<VQA>" and "".join(part["text"] for part in values["prompt"]) == f"<s>{VQA}</s>"


@pytest.mark.release
def test_an_adapter_and_a_conversion_carry_the_tasks(
    rows: Path, mini_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert train(rows, mini_folder, "--steps", 4, "--lora", 2, "--task-kind", "GENERATE_TAGS=text") == 0
    adapter = tmp_path / "run" / "adapter"
    own = (token_task("<GENERATE_TAGS>"), token_task("<VQA>"))
    assert read_tasks(adapter) == own
    assert florence("convert", mini_folder, tmp_path / "whole", "--adapter", adapter, "--task-kind", "FIND=boxes") == 0
    assert read_tasks(tmp_path / "whole") == (*own, token_task("<FIND>", "boxes"))
    capsys.readouterr()
    answers = []
    for words in (("--model", mini_folder, "--adapter", adapter), ("--model", tmp_path / "whole")):
        search = "--json --device cpu --beams 1 --max-new-tokens 4".split()
        assert florence("run", VQA, tmp_path / "scene.png", *words, *search) == 0
        answers.append(json.loads(capsys.readouterr().out)["raw_text"])
    assert answers[0] == answers[1]
    loaded = florence2.load(mini_folder, adapter=adapter)
    assert loaded.processor.tasks.own == own and florence2.load(mini_folder).processor.tasks.own == ()


def test_tasks_of_two_models_in_one_process_stay_apart(mini_folder: Path) -> None:
    f = florence2.load(mini_folder)
    one, two = (florence2.add_tasks(f, task) for task in (token_task("<X>"), Task("<X>", "Find it.", "boxes")))
    assert one.processor.prompt("<X>a") == f.processor.encode("<X>a")
    assert two.processor.prompt("<X>") == f.processor.encode("Find it.")
    assert "<X>" not in f.processor.tasks and "<X>" not in TASKS


def test_a_misspelt_task_is_not_a_new_one(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ("<ODD>", "a"), ("<Caption>", "a"), ("<VQA>why?", "a"), ("free <NEW>", "a"))
    assert find_new_tasks([path], TASKS) == ["<VQA>"]


def test_a_run_with_other_kinds_is_another_run(rows: Path, mini_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    image, out = tmp_path / "scene.png", tmp_path / "out"
    chosen = ("--model", mini_folder, "--device", "cpu", "--beams", 1, "--max-new-tokens", 2, "--out", out)
    assert rows.exists() and florence("run", "<VQA>", image, *chosen, "--task-kind", "VQA=text") == 0
    assert florence("run", "<VQA>", image, *chosen, "--task-kind", "VQA=boxes") == 2
    assert "task_kind was {'<VQA>': 'text'} and is {'<VQA>': 'boxes'}" in capsys.readouterr().err


def test_two_questions_in_one_folder_have_two_answers(
    rows: Path, mini_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Whether the question stands after the token or in --text, it is part of the work that is done already."""
    out = tmp_path / "out"
    chosen = ("--model", mini_folder, "--device", "cpu", "--beams", 1, "--max-new-tokens", 2, "--out", out)
    asked = (tmp_path / "scene.png", *chosen, "--task-kind", "VQA=text")
    assert rows.exists()
    for words in (["<VQA>why?"], ["<VQA>how?"], ["vqa", "--text", "why?"]):
        assert florence("run", words[0], *asked, *words[1:]) == 0
    kept = [json.loads(line)["input"] for line in (out / "results.jsonl").read_text().splitlines()]
    assert kept == ["why?", "how?"]


@pytest.mark.release
def test_a_fresh_process_finds_the_tasks_of_a_folder(rows: Path, mini_folder: Path, tmp_path: Path) -> None:
    """The file is data: a task in it that names code is refused, and nothing is imported."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(mini_folder, folder)
    write_tasks(folder, [token_task("<VQA>")])
    words = ["run", "<VQA>why?", str(rows.parent / "scene.png"), "--model", str(folder), "--max-new-tokens", "2"]
    command = [sys.executable, "-m", "florence2", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "tasks.json").write_text('{"tasks": [{"token": "<VQA>", "parser": "os:system"}]}')
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "tasks[0].parser is an unknown field" in done.stderr
