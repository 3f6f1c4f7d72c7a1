"""What lives in extras: found by name, and one sentence where a package is missing."""

import sys

import pytest

from florence2.cli.extras import EXTRAS, load_extra
from florence2.errors import OptionError


def test_a_module_is_found() -> None:
    assert load_extra("florence2.inspect", "inspect", "f.trace").trace is not None


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError) as error:
        load_extra("matplotlib", "inspect", "The plot")
    assert str(error.value) == (
        'The plot needs the package matplotlib, which is not installed: pip install "florence2[inspect]".'
    )


def test_our_own_missing_module_is_our_own_mistake() -> None:
    with pytest.raises(ModuleNotFoundError):
        load_extra("florence2.nowhere", "inspect", "f.trace")


def test_every_command_names_its_module() -> None:
    assert all(found.module.startswith("florence2.") and found.extra for found in EXTRAS.values())
