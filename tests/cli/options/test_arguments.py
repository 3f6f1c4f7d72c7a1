"""What options mean: functions and settings by name, and sentences that name the options."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from florence2.checkpoints.checks.functions import find_function
from florence2.cli.main import main, naming_options
from florence2.cli.options import arguments, tasks
from florence2.cli.options.arguments import SETTINGS
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("insert", "give MODULE:FUNCTION, such as"),
        (":insert", "give MODULE:FUNCTION, such as"),
        (".mine:insert", "give MODULE:FUNCTION, such as"),
        ("no_such_module:insert", "the module no_such_module was not found, neither in the current folder"),
        ("mine.py:insert", r"the module mine\.py was not found, .* leave out '\.py'\."),
        ("json.no_such_module:insert", "the module json.no_such_module was not found"),
        ("mine:missing", "mine.py has no function missing"),
        ("mine:NUMBER", "mine.py has no function NUMBER"),
        ("needy:insert", "needy imports no_such_package, which is not installed"),
        ("sys:version", "sys has no function version"),
        ("half:insert", r"importing half raised SyntaxError: .* \(half.py, line 2\)"),
        ("broken:insert", r"importing broken raised ZeroDivisionError: division by zero \(broken.py, line 1\)"),
        ("leaving:insert", r"importing leaving raised SystemExit: 0 \(leaving.py, line 1\)"),
        ("lazy_names:insert", r"lazy_names raised KeyError: 'insert' \(lazy_names.py, line 2\)"),
    ],
)
def test_a_function_that_does_not_exist(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("NUMBER = 3\n")
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    (tmp_path / "half.py").write_text("\ndef insert(\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "lazy_names.py").write_text("def __getattr__(name):\n    return {}[name]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OptionError, match=words):
        find_function(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_beams": 0}, "--beams is 0; it must be"),
        ({"max_new_tokens": -1}, "--max-new-tokens is -1"),
        ({"sample": True, "num_beams": 4}, "--sample is True and --beams 4; sampling uses no beams, so set --beams 1."),
        ({"top_k": 5, "num_beams": 1}, "--top-k 5 has no effect without sampling; set --sample as well."),
        ({"top_p": 2}, "--top-p is 2; it must be"),
        ({"sample": True, "seed": -1}, "--seed is -1; it must be a whole number from 0 to 2**63 - 1."),
        ({"num_return_sequences": 5}, "num_return_sequences 5 is more than --beams 3"),
    ],
)
def test_settings_are_called_by_the_names_of_their_options(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as raised, naming_options(SETTINGS):
        GenerationOptions().changed(**changes)
    message = str(raised.value)
    assert message.startswith(words) and not re.search(r"num_beams|max_new|top_[kp]|sample=|(?<!-)-sample", message)


def test_an_answer_that_takes_too_much_names_the_options_too(
    small_folder: Path, picture_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("florence2.generation.budget.free_bytes", lambda device: 1000)
    assert main(["run", "od", str(picture_file), "--model", str(small_folder)]) == 1
    assert "lower --max-new-tokens or --beams, or free some memory" in capsys.readouterr().err
    rows = picture_file.parent / "rows.jsonl"
    rows.write_text(json.dumps({"image": picture_file.name, "prefix": "<OCR>", "suffix": "x"}) + "\n")
    for words in ([], ["--json"]):
        assert main(["evaluate", str(rows), "--model", str(small_folder), *words]) == 1
        captured = capsys.readouterr()
        assert "lower --max-new-tokens or --beams" in captured.out + captured.err


@pytest.mark.parametrize(("given", "allowed"), [({}, False), ({"allow_pickle": True}, True)])
def test_a_command_without_the_option_allows_no_pickle(
    given: dict[str, bool], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(arguments, "resolve", lambda *_, allow_pickle, report: calls.append(allow_pickle))
    monkeypatch.setattr(tasks, "find_checkpoint", lambda name, revision, allow_pickle: calls.append(allow_pickle))
    words = argparse.Namespace(model="owner/unknown", revision=None, task_kind=[], **given)
    arguments.check_model(words)
    tasks.model_tasks(words, ["depth"])
    assert calls == [allowed] * 3


USERS = """
class Silent(Exception):
    def __str__(self):
        return self.nothing

def breaks(model):
    raise RuntimeError("one\\ntwo " + 5000 * "x")

def calls(model):
    breaks(model)

def leaves(model):
    raise SystemExit(0)

def silent(model):
    raise Silent

def takes_two(model, size):
    pass

def steps(model):
    yield model

async def later(model):
    pass

def unconfigured(model):
    model.config = None
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "os.path:join",
            r"--prepare os.path:join: the function raised TypeError: expected str, bytes .*Florence2Model\.",
        ),
        ("users:breaks", r"the function raised RuntimeError: one two x{270,300}\.\.\. \(users.py, line 7\)\."),
        ("users:calls", r"the function raised RuntimeError: one .* \(users.py, line 7\)\."),
        ("users:leaves", r"the function raised SystemExit: 0 \(users.py, line 13\)\."),
        ("users:silent", r"the function raised Silent: .* \(users.py, line 16\)\."),
        ("users:takes_two", r"the function raised TypeError: takes_two\(\) missing 1 required .*'size'\."),
        ("users:steps", "the function is a generator or a coroutine, so calling it changes nothing"),
        ("users:later", "the function is a generator or a coroutine, so calling it changes nothing"),
        ("users:unconfigured", "prepare replaces the model's configuration by None"),
    ],
)
def test_a_function_of_the_user_that_fails_is_one_sentence(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "users.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["convert", "nano", "out", "--prepare", name]) == 2
    errors = capsys.readouterr().err
    assert re.search(words, errors) and errors.startswith("florence2: ") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
