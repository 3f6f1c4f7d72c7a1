"""The page on fine-tuning: every command runs, in its order, each on what those before it left."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from florence2 import load
from florence2.cli import main as cli
from recipes.nano import write_scenes

DOCS = Path(__file__).parents[2] / "docs"
FEWER = {"--count": "4", "--epochs": "0.5", "--batch": "2"}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_fine_tuning", DOCS / "run_fine_tuning.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def fewer(words: list[str], model: Path) -> list[str]:
    """Shorten a command to four images and one update, with a fast model."""
    replaced = [FEWER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    short = ["--max-new-tokens", "9"] if words[1] in ("evaluate", "run") else []
    return [str(model) if word == "nano" else word for word in replaced] + short


@pytest.mark.release  # nine commands
def test_every_command_runs(
    mini_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    verbs = []
    for words in script.commands():
        small = fewer(words, mini_folder)
        if words[:3] == ["python", "-m", "recipes.nano.write_scenes"]:
            assert write_scenes.main(small[3:]) == 0
        else:
            assert words[0] == "florence2" and cli.main(small[1:]) == 0, capsys.readouterr().err
            verbs.append(words[1])
    assert verbs == ["train", "evaluate", "train", "evaluate", "run", "train", "evaluate", "convert", "run"]
    for run in ("full", "lora"):
        assert json.loads((tmp_path / "runs" / run / "settings.json").read_text())["steps"] == 1
    merged = load(tmp_path / "runs" / "merged").model.state_dict()
    by_adapter = load(mini_folder, adapter=tmp_path / "runs" / "lora" / "adapter").model.state_dict()
    assert all((merged[name] - value).abs().max() < 1e-6 for name, value in by_adapter.items())


def test_the_line_shown_is_one_that_is_written(tmp_path: Path) -> None:
    """And what `--check` says of them all is of as many."""
    page = script.PAGE.read_text(encoding="utf-8")
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.S)
    (words,) = [words for words in script.commands() if "sizes/train" in words and "--count" in words]
    write_scenes.main(
        [str(tmp_path), *words[4 : words.index("--count")], "--count", "2", *words[words.index("--ask") :]]
    )
    lines = (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(shown) in map(json.loads, lines)
    assert f"answers on {words[words.index('--count') + 1]} images" in page


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", script.PAGE.read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), target


def test_the_script_runs_what_the_page_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the folder given, by this Python, until something fails."""
    monkeypatch.setattr(script, "commands", lambda: [["florence2", "--version"], ["florence2", "info", "nowhere"], []])
    assert script.main([str(tmp_path / "new")]) == 2
    printed = capfd.readouterr()
    assert printed.out.splitlines()[0] == "$ florence2 --version" and "$ florence2 info nowhere" in printed.out
    assert "nowhere" in printed.err and script.main([]) == 2
