"""Options that several commands share: which commands have them, and what their help lists."""

import pytest

from florence2.checkpoints.checks.loading import DTYPES as TORCH_DTYPES
from florence2.cli.main import COMMANDS, main
from florence2.cli.options.groups import DTYPES
from florence2.train.command import PARTS
from florence2.train.freeze import PARTS as FREEZABLE


def test_names_that_need_no_torch_are_those_of_modules_that_do() -> None:
    assert tuple(TORCH_DTYPES) == DTYPES and tuple(FREEZABLE) == PARTS


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("download", "dataset")])
def test_help_lists_every_name_of_a_model(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # argparse breaks long lines at hyphens
    with pytest.raises(SystemExit):
        main([name, "--help"])
    names = "nano (comes with the package), base, large, base-ft, large-ft, OWNER/NAME, a folder or a file"
    assert names in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "cascade", "evaluate", "convert", "info", "audit", "download"])
def test_pickles_may_be_allowed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "--allow-pickle" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "cascade", "evaluate"])
def test_every_command_that_answers_takes_the_ways_to_load(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    out = capsys.readouterr().out
    assert all(option in out for option in ("--adapter", "--dtype", "--attention", "--device", "--revision"))


@pytest.mark.parametrize("name", ["run", "cascade", "convert", "train", "evaluate", "inspect"])
def test_every_command_that_loads_a_model_can_prepare_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert "--prepare MODULE:FUNCTION" in text and "--change NAME=VALUE" in text
