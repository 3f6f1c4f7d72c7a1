"""Help and wrong command lines are answered without torch, whose import takes longer than everything else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import florence2
from florence2.checkpoints.files import write_tasks
from florence2.cli.main import COMMANDS
from florence2.inputs.tasks import Task
from parity.recipe import make_picture

WITHOUT_TORCH = """
import contextlib, io, json, sys, traceback
sys.modules["torch"] = None  # any import of it fails
from florence2.cli.main import main

def call(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as error:
            code = error.code
        except Exception:
            code = traceback.format_exc()
    return [code, out.getvalue(), err.getvalue()]

print(json.dumps([call(words) for words in json.load(sys.stdin)]))
"""
HELP = [["--help"], *([name, "--help"] for name in COMMANDS)]
WRONG = [
    ("", "COMMAND"),
    ("fly", "'fly'"),
    ("run od {image} --fly", "--fly"),
    ("run od {image} --dtype int8", "'int8'"),
    ("run od {image} --batch two", "'two'"),
    ("run od {image} --batch 0", "--batch is 0"),
    ("run od {image} --beams 0", "florence2: --beams is 0"),
    ("run od {image} --sample --beams 3", "--beams 3; sampling uses no beams, so set --beams 1."),
    ("cascade {image} --sample --temperature 0", "florence2: --temperature is 0.0; it must be 0.01 to 100"),
    ("run od {image} --seed 3", "--seed 3 has no effect without sampling; set --sample as well"),
    ("run <VQA> {image}", "Known tasks"),
    ("run captoin {image}", "did you mean caption?"),
    ("run depth {image}", "Unknown task 'depth'. Known tasks: <OCR>, "),
    ("run depth {image} --model nano", "A free prompt has more than one word"),
    ("run ocr-with-region {image}", "did you mean ocr_with_region?"),
    ("run depth {image} --model nobody/nothing", "nobody/nothing is not in the local cache"),
    ("run <DEPTH> {image} --model nobody/nothing", "nobody/nothing is not in the local cache"),
    ("run <VQA> {image} --model {broken}", "tasks.json: tasks[0] lacks 'token'"),
    ("run distance {image} --model {tasks}", "did you mean distances?"),
    ("run distances {image} --model {tasks}", "Task <DISTANCES> needs a text"),
    ("run od", "Which image?"),
    ("run {image} od", "The task comes before the image"),
    ("run open_vocabulary_detection {image}", "needs a text"),
    ("run region_to_ocr {image}", "needs a region"),
    ("run od {image} --text cat", "takes no --text"),
    ("run od {image} --box 1,2,3,4", "takes no --box"),
    ("run region_to_ocr {image} --box 1,2,3", "'1,2,3' is not a box"),
    ("run od {image} --draw", "--draw needs --out"),
    ("run od {image} --model nowhere", "'nowhere'"),
    ("run od {image} --model {empty} --adapter nowhere", "'nowhere'"),
    ("run od {empty}", "holds no image"),
    ("run od {nothing}", 'The name of an image is empty ("")'),
    ("run {nothing} {image}", "A task must be a token"),
    ("run od {image} --out {nothing}", 'argument --out: the name is empty ("")'),
    ("run od {image} --model {nothing}", "argument --model: the name is empty"),
    ("run od {image} --model {empty} --adapter {nothing}", "argument --adapter: the name is empty"),
    ("run od {image} --out {image}", "is a file; answers need a folder"),
    ("run od {image} --format csv", "usage: florence2 run"),
    ("cascade {nothing}", "argument IMAGE: the name is empty"),
    ("convert {nothing} {empty}", "argument SOURCE: the name is empty"),
    ("convert {empty} {nothing}", "argument FOLDER: the name is empty"),
    ("init {nothing} --tokenizer nano", "argument FOLDER: the name is empty"),
    ("init {empty} --tokenizer {nothing}", "argument --tokenizer: the name is empty"),
    ("info {nothing}", "argument CHECKPOINT: the name is empty"),
    ("download {nothing}", "argument MODEL: the name is empty"),
    ("audit {nothing}", "argument A: the name is empty"),
    ("audit {empty} {nothing}", "argument B: the name is empty"),
    ("inspect od {nothing} --json", "argument IMAGE: the name is empty"),
    ("inspect od {image} --out {nothing}", "argument --out: the name is empty"),
    ("inspect od {image} --plots {nothing}", "argument --plots: the name is empty"),
    ("train {nothing} --out {empty}/run", "argument DATA: the name is empty"),
    ("train {image} --out {nothing}", "argument --out: the name is empty"),
    ("train {image} --out {empty}/run --images {nothing}", "argument --images: the name is empty"),
    ("train {image} --out {empty}/run --validation {nothing}", "argument --validation: the name is empty"),
    ("evaluate {nothing}", "argument TABLE|DATA: the name is empty"),
    ("cascade {empty}", "holds no image"),
    ("cascade {image} --detail long", "'long'"),
    ("cascade {image} --model nowhere", "'nowhere'"),
    ("download nowhere", "'nowhere'"),
    ("convert nowhere {empty}", "'nowhere'"),
    ("init {empty} --tokenizer nowhere", "'nowhere'"),
    ("info nowhere", "'nowhere'"),
    ("inspect od", "IMAGE"),
    ("inspect {image} od --json", "The task comes before the image"),
    ("inspect captoin {image} --json", "did you mean caption?"),
    ("inspect od {image}", "Where should the explanation go?"),
    ("inspect od {image} --json --text cat", "takes no --text"),
    ("inspect region_to_ocr {image} --json --box 1,2,3,4 --box 2,3,4,5", "--box is given 2 times"),
    ("inspect od {image} --json --beams 0", "florence2: --beams is 0"),
    ("inspect od {image} --json --model nowhere", "'nowhere'"),
    ("inspect od {empty}/absent.png --json", "absent.png"),
    ("audit nowhere", "'nowhere'"),
    ("audit {empty} --top -1", "--top is -1"),
    ("audit {empty} --revision-b v2", "--revision-b"),
    ("train {image}", "--out DIR"),
    ("train {image} --out {empty}/run --batch 0", "--batch is 0"),
    ("train {image} --out {empty}/run --lora 0", "--lora is 0"),
    ("train {image} --out {empty}/run --learning-rate inf", "Training settings: --learning-rate is inf"),
    ("train {empty}/absent.jsonl --out {empty}/run", "absent.jsonl does not exist"),
    ("train {image} --out {empty}/run --model nowhere", "'nowhere'"),
    ("evaluate {image} --batch 0", "--batch is 0"),
    ("evaluate {empty}/absent.jsonl", "absent.jsonl does not exist"),
    ("evaluate {image} --model nowhere", "'nowhere'"),
    ("serve --model nowhere", "'nowhere'"),
    ("serve --model {nothing}", "argument --model: the name is empty"),
    ("serve --port 70000", "--port is 70000; it must be at most 65535"),
    ("serve --max-queue 0", "--max-queue is 0"),
    ("serve --host 0.0.0.0", "say --no-key to let everyone in"),
    ("serve --api-key-file {empty}/keys", "keys cannot be read: No such file"),
]
"""A command line without its program, and a part of the message. {image} is a file, {nothing} an empty name; the
rest are folders."""

UNREADABLE = [
    "run od {empty}/absent.png --model nano",
    "run od caption {empty}/absent.png {tasks}/tasks.json --json --model nano",
]
"""Images of which none can be read."""

Results = dict[tuple[str, ...], tuple[object, str, str]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image file, an empty folder, and folders with nothing but tasks."""
    folder = tmp_path_factory.mktemp("places")
    make_picture(5, 32, 20).save(folder / "photo.png")
    for name in ("empty", "tasks", "broken"):
        (folder / name).mkdir()
    write_tasks(folder / "tasks", [Task("<DISTANCES>", "How far is {input}?", takes="text")])
    (folder / "broken" / "tasks.json").write_text('{"tasks": [{"sentence": "How far?"}]}')
    return {"image": folder / "photo.png", **{name: folder / name for name in ("empty", "tasks", "broken")}}


def fill(line: str, places: dict[str, Path]) -> list[str]:
    return [word.format_map({**places, "nothing": ""}) for word in line.split()]


@pytest.fixture(scope="module")
def results(places: dict[str, Path]) -> Results:
    """Exit code, stdout and stderr of every command line, all from one process in which torch cannot be imported."""
    lines = [
        *HELP,
        ["--version"],
        *(fill(line, places) for line in UNREADABLE),
        *(fill(line, places) for line, _ in WRONG),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    words = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(
        words, input=json.dumps(lines), capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return {tuple(line): tuple(result) for line, result in zip(lines, json.loads(done.stdout), strict=True)}


def test_the_program_imports_no_torch_for_help() -> None:
    """The same without the block, in the program itself."""
    words = [sys.executable, "-X", "importtime", "-m", "florence2", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "argparse" in imported and "torch" not in imported


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help(words: list[str], results: Results) -> None:
    code, out, err = results[tuple(words)]
    assert (code, err) == (0, "") and out.startswith(f"usage: {' '.join(['florence2', *words[:-1]])} ")


def test_the_version(results: Results) -> None:
    assert results["--version",] == (0, f"florence2 {florence2.__version__}\n", "")


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_wrong_command_lines(line: str, message: str, results: Results, places: dict[str, Path]) -> None:
    code, out, err = results[tuple(fill(line, places))]
    assert code == 2 and out == "" and message in err and "torch" not in err


def test_images_are_looked_at_before_a_model_is_loaded(results: Results, places: dict[str, Path]) -> None:
    code, out, err = results[tuple(fill(UNREADABLE[0], places))]
    assert (code, out) == (
        1,
        "",
    ) and err == f"florence2: {places['empty']}/absent.png does not exist; check the path.\n"
    code, out, err = results[tuple(fill(UNREADABLE[1], places))]
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (1, "florence2: 4 of 4 answers failed.\n") and len(rows) == 4
    assert [row["task"] for row in rows] == ["<OD>", "<CAPTION>"] * 2 and all(row["error"] for row in rows)


def test_wrong_command_lines_write_nothing(results: Results, places: dict[str, Path]) -> None:
    assert results and not list(places["empty"].iterdir())
