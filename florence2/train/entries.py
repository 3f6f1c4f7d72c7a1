"""Shared by the readers of training data: one question about one image, checks, and a list of problems."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

from florence2.errors import Florence2Error, clip, shown
from florence2.inputs.tasks import TASKS, Task, check_prompt
from florence2.inputs.tokenizer import ADDED_TOKENS

LISTED = 20
"""The most problems of a file that a message lists."""
_MAX_PIXEL = 1e7
_LOCATION_LIKE = re.compile(r"<\s*loc[^a-z<>][^<>]*>?", re.IGNORECASE)  # "<locale>" is a word
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_TOKENS = frozenset(ADDED_TOKENS)


class DataError(Florence2Error):
    """Training data cannot be read or cannot be trained on."""


@dataclass(frozen=True)
class Entry:
    """One question about one image, from the `place` of a file, such as "line 3".

    An empty suffix means that there is nothing to find. `tasks` are those of the model. Raises DataError or PromptError
    for a prompt that no task accepts, and for location tokens that do not exist.
    """

    image: Path
    place: str
    prefix: str
    suffix: str
    tasks: InitVar[Mapping[str, Task]] = TASKS

    def __post_init__(self, tasks: Mapping[str, Task]) -> None:
        check_prompt(self.prefix, tasks=tasks)
        check_text("prefix", self.prefix)
        check_text("suffix", self.suffix)


def check_text(name: str, text: str) -> None:
    """Raise DataError when `text`, called `name`, holds an unknown location token or half a character."""
    for token in _LOCATION_LIKE.findall(text):
        if token not in _TOKENS:
            raise DataError(
                f"{name} holds {shown(token)}; location tokens are <loc_0> to <loc_999>, written exactly so."
            )
    if _HALF_CHARACTER.search(text):
        raise DataError(f"{name} holds half a character, {shown(ascii(text))}; write the file as UTF-8.")


def read_pixels(values: object, image_size: tuple[int, int]) -> list[float]:
    """Read coordinates x, y, x, y, ... in pixels from a JSON value, unchanged.

    `image_size` is (width, height). Raises DataError unless they are pairs of numbers that lie at least partly in the
    image, and for numbers on another scale: fractions of its sides, or more than a side outside it.
    """
    numbers = read_numbers(values)
    if not numbers or len(numbers) % 2:
        raise DataError(f"coordinates come in pairs x, y, not {len(numbers)} numbers: {shown(values)}.")
    if max(numbers) <= 1 and any(number != int(number) for number in numbers):
        raise DataError(f"{shown(values)} look like fractions of the image's sides; give pixels.")
    for row, side in ((numbers[0::2], image_size[0]), (numbers[1::2], image_size[1])):
        if max(row) < 0 or min(row) >= side:
            width, height = image_size
            raise DataError(f"{shown(values)} lies outside the image of {width} x {height} pixels.")
        if max(row) > 2 * side or min(row) < -side:
            width, height = image_size
            raise DataError(
                f"{shown(values)} reaches far beyond the image of {width} x {height} pixels; give pixels of this "
                "image, not of another size and not location bins."
            )
    return numbers


def read_numbers(values: object) -> list[float]:
    """Read a list of numbers from a JSON value. Raise DataError for anything else, and for absurdly large numbers."""
    rows: list[Any] = values if isinstance(values, list) else [None]
    for value in rows:
        if type(value) not in (int, float) or not -_MAX_PIXEL < value < _MAX_PIXEL:
            raise DataError(f"coordinates must be a list of numbers in pixels, not {shown(values)}.")
    return rows


def read_text(values: dict[str, Any], key: str) -> str:
    """Return the text under `key`. Raise DataError when it is missing or not a text."""
    if not isinstance(values.get(key), str):
        problem = f"{key} is {shown(values[key])}" if key in values else f"{key!r} is missing"
        raise DataError(f"{problem}; it must be a text.")
    text: str = values[key]
    return text


def read_answer(values: dict[str, Any], key: str) -> str:
    """Return the text under `key`. Raise DataError when it is missing or blank, which is probably a mistake."""
    text = read_text(values, key)
    if not text.strip():
        raise DataError(f"{key} is empty; write an answer, or leave the question out.")
    return text


class Problems:
    """The problems of one file, collected so that all of them are reported at once."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        self.listed: list[str] = []

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Note a Florence2Error that the block raises, and continue after the block."""
        try:
            yield
        except Florence2Error as error:
            self.count += 1
            if self.count <= LISTED:
                self.listed.append(f"{place}: {clip(error)}")

    def check(self) -> None:
        """Raise DataError if there are any problems, with their number and the first twenty."""
        if self.count:
            total = "1 problem" if self.count == 1 else f"{self.count:,} problems"
            first = f", the first {LISTED}" if self.count > LISTED else ""
            raise DataError("\n  ".join([f"{self.path} has {total}{first}:", *self.listed]))


def check_choice(name: str, chosen: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise DataError for a chosen value that is not allowed."""
    for value in chosen:
        if value not in allowed:
            raise DataError(f"{name} {value!r} cannot be asked with this file; choose from {', '.join(allowed)}.")
