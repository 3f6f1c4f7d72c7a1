"""The cases of a test that every change meets, and those that are left to a release."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def keep(kept: Collection[int | str], cases: Iterable[Any]) -> list[Any]:
    """Return the cases of a parametrisation, marked `release` unless their place or their name is kept.

    A tuple is a case of several arguments, as pytest has it.
    """
    every = list(cases)
    unknown = [each for each in kept if each not in every and each not in range(len(every))]
    assert not unknown, f"{unknown} are no cases"
    return [
        case if place in kept or (isinstance(case, str) and case in kept) else _later(case)
        for place, case in enumerate(every)
    ]


def _later(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.release)
