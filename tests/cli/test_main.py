"""The command line as a user types it: in this process, and as a program."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import florence2
from florence2.cli.main import COMMANDS, main, require_extra
from florence2.errors import OptionError

FEW = ["--max-new-tokens", "8"]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "<VQA>", "x.png"], "Known tasks: <OCR>"),
        (["run", "<VQA>how?", "x.png"], "Known tasks: <OCR>"),
        (["run", "<OD>"], "Which image?"),
        (["run", "<OD>", "<CAPTION>"], "Which image?"),
        (["run", "<OD>", "x.png", "--text", "cat"], "Task '<OD>' takes no --text; leave it out."),
        (["run", "od", "ocr", "x.png", "--text", "cat"], "None of the tasks od, ocr takes --text; leave it out."),
        (["run", "<OD>", "x.png", "--box", "1,2,3,4"], "Task '<OD>' takes no --box; leave it out."),
        (["run", "<REGION_TO_OCR>", "x.png"], "needs a region"),
        (["run", "<REGION_TO_OCR>", "x.png", "--text", "there"], "needs a region"),
        (
            ["run", "region_to_ocr", "x.png", "--text", "a", "--box", "1,2,3,4"],
            "Task 'region_to_ocr' takes no --text when --box is given; leave it out.",
        ),
        (["run", "<OPEN_VOCABULARY_DETECTION>", "x.png"], "needs a text"),
        (["run", "<OD>", "x.png", "--draw"], "--draw needs --out"),
        (["run", "<OD>", "x.png", "--batch", "0"], "--batch is 0; it must be at least 1."),
        (["run", "<OD>", "x.png", "--model", "no/such/place.safetensors"], "no/such/place.safetensors"),
        (["run", "<OD>", "x.png", "--device", "tpu"], "cannot be used here"),
        (["run", "<OD>", "x.png", "--beams", "0"], "--beams is 0; it must be a whole number of at least 1."),
        (["convert", "nowhere/at/all", "out"], "nowhere/at/all"),
        (["info", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence_and_exit_code_2(
    arguments: list[str], words: str, small_folder: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(picture_file) if word == "x.png" else word for word in arguments]
    if arguments[0] == "run" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(small_folder)]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == "" and len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["--", "run"],
        ["run"],
        ["run", "<OD>", "x", "--fly"],
        ["run", "<OD>", "x", "--box", "1,2,3"],
        ["run", "<OD>", "x", "--box", "1,2,3,nan"],
        ["run", "<OD>", "x", "--dtype", "int8"],
        ["init", "d"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "usage: florence2" in capsys.readouterr().err


def test_a_missing_package_is_one_sentence() -> None:
    with pytest.raises(OptionError) as error, require_extra("inspect", "The plot"):
        raise ModuleNotFoundError(name="matplotlib")
    assert str(error.value) == (
        "The plot needs the package matplotlib, which is not installed; in a checkout of this project: "
        'pip install ".[inspect]"'
    )


def test_a_missing_module_of_our_own_is_our_own_mistake() -> None:
    with pytest.raises(ModuleNotFoundError), require_extra("inspect", "The plot"):
        importlib.import_module("florence2.nowhere")


def test_an_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = SimpleNamespace(main=lambda _: importlib.import_module("a_package_that_does_not_exist"))
    monkeypatch.setitem(sys.modules, COMMANDS["evaluate"].module, command)
    assert run("evaluate", "data.jsonl") == 2
    assert "`florence2 evaluate` needs the package a_package_that_does_not_exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(name, "--help")
    assert capsys.readouterr().out.startswith(f"usage: florence2 {name} ")


def test_init_info_convert(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    assert run("init", made, "--preset", "tiny", "--tokenizer", small_folder, "--dtype", "bfloat16", "--seed", 3) == 0
    assert capsys.readouterr().out == f"{made}\n"
    assert run("info", made) == 0
    text = capsys.readouterr().out
    assert "layout: microsoft" in text and "bfloat16" in text and "sha256" in text
    assert run("convert", made, tmp_path / "native", "--layout", "native", "--dtype", "float32") == 0
    capsys.readouterr()
    assert run("info", tmp_path / "native" / "model.safetensors", "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["layout"] == "native" and list(described["dtypes"]) == ["float32"]
    assert run("init", made, "--preset", "tiny", "--tokenizer", small_folder) == 2
    assert "holds a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("early_stopping", "shown"), [(True, "true"), (False, "false"), ("never", "never")])
def test_info_says_settings_as_the_file_does(
    early_stopping: object, shown: str, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_folder, tmp_path / "c")
    file = tmp_path / "c" / "config.json"
    values = json.loads(file.read_text())
    values["text_config"] |= {"early_stopping": early_stopping, "length_penalty": 0.5, "max_new_tokens": 1000}
    file.write_text(json.dumps(values))
    assert run("info", tmp_path / "c") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {f"  early_stopping: {shown}", "  length_penalty: 0.5", "  max_new_tokens: 1,000"} <= set(lines)


def test_convert_a_pickle(
    small_folder: Path, picture_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(small_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert run("run", "<OD>", picture_file, "--model", folder) == 2
    assert "only as a pickle" in capsys.readouterr().err
    assert run("convert", folder, tmp_path / "a") == 2
    assert run("convert", folder / "pytorch_model.bin", tmp_path / "a", "--allow-pickle") == 0
    assert run("convert", folder, tmp_path / "b", "--allow-pickle") == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


# ---- as a program --------------------------------------------------------------------------------------------------


def program(*arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "florence2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.release
def test_an_image_on_stdin_and_a_narrow_encoding(small_folder: Path, picture_file: Path) -> None:
    command = [sys.executable, "-m", "florence2", "run", "<CAPTION>", "-", "--model", str(small_folder), *FEW]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, input=picture_file.read_bytes(), capture_output=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0 and done.stdout and done.stderr == b""


@pytest.mark.release  # a process that prints
def test_a_reader_that_has_seen_enough(small_folder: Path, picture_file: Path) -> None:
    words = ["run", "od", "caption", "ocr", str(picture_file), "--model", str(small_folder), *FEW]
    command = f"{sys.executable} -m florence2 {shlex.join(words)} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("== ") and done.stderr == ""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert program("--version").stdout == f"florence2 {florence2.__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    assert "cascade" in capsys.readouterr().out
