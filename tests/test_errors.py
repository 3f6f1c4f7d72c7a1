"""The parts of messages: values and lists cut short, and numbers of other libraries."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from florence2.errors import OutputError, clip, listing, plain, shown


def test_long_texts_end_in_dots() -> None:
    assert clip("x" * 300) == "x" * 300 and clip("x" * 301) == "x" * 297 + "..."
    assert clip("abcdef", 5) == "ab..." and clip(12345, 5) == "12345"
    assert shown("x" * 58) == f"'{'x' * 58}'" and shown("x" * 59) == f"'{'x' * 56}..."
    assert shown([1, 2], 6) == "[1, 2]" and shown([1, 2], 5) == "[1..."


def test_values_without_a_repr_are_named_by_their_type() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ValueError

    assert shown(Broken()) == "a value of the type Broken" and shown(10**5000) == "a value of the type int"


def test_long_lists_are_counted() -> None:
    items = [str(i) for i in range(1010)]
    assert listing(items[:8]) == "0, 1, 2, 3, 4, 5, 6, 7" and listing(items[:9]).endswith(", 7, and 1 more")
    assert listing(items, "; ", 2) == "0; 1; and 1,008 more" and listing([]) == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.array(3), 3),
        (torch.tensor(3), 3),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(True), True),
        (np.bool_(True), True),
        (True, True),
        (Fraction(1, 2), 0.5),
        ("3", "3"),
        (None, None),
    ],
)
def test_numbers_of_every_library_become_pythons(value: Any, expected: object) -> None:
    assert plain(value) == expected and type(plain(value)) is type(expected)


@pytest.mark.parametrize("value", [np.array([3]), torch.ones(1), torch.ones((), device="meta"), [3], Fraction(10**400)])
def test_anything_else_stays_itself(value: Any) -> None:
    assert plain(value) is value


def test_an_output_error_is_an_os_error_with_the_reason_alone() -> None:
    error = OutputError("x cannot be written: full.", "full")
    assert isinstance(error, OSError) and str(error) == "x cannot be written: full." and error.strerror == "full"
