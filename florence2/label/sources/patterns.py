"""Patterns of paths: the braces that WebDataset's users write, and wildcards."""

import glob
import itertools
import math
import os
import re
from collections.abc import Iterator

from florence2.errors import ImageError, shown

MAX_EXPANDED = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")


def has_wildcards(argument: str) -> bool:
    """Return whether a path stands for all that match it: "*.jpg", "**/*.tar", "[0-9].png"."""
    return glob.has_magic(argument)


def match_wildcards(pattern: str) -> list[str]:
    """Return the paths that match a pattern, in alphabetical order part by part; "**" stands for folders of any depth.

    Raises ImageError if nothing matches.
    """
    # NUL, the least character, makes a folder's content come before all names that begin with the folder's
    paths = sorted(glob.iglob(pattern, recursive=True), key=lambda path: path.replace(os.sep, "\0"))  # noqa: PTH207
    if not paths:
        raise ImageError(f"No file or folder matches {pattern}.")
    return paths


def expand_braces(argument: str) -> list[str]:
    """Return the paths that braces stand for: {00000..00069} for numbers, {train,val} for words; without any, itself.

    Raises ImageError for more than `MAX_EXPANDED` paths.
    """
    pieces = _BRACES.split(argument)
    choices = [_Choices(piece) if odd else [piece] for piece, odd in zip(pieces, itertools.cycle((False, True)))]
    total = math.prod(each.count if isinstance(each, _Choices) else 1 for each in choices)
    if total > MAX_EXPANDED:
        raise ImageError(f"{shown(argument)} stands for {total:,} paths; the limit is {MAX_EXPANDED:,}.")
    return ["".join(path) for path in itertools.product(*choices)]


class _Choices:
    """The texts that one pair of braces stands for; one that holds neither a range nor a comma is kept."""

    def __init__(self, inside: str):
        self._inside, self._range = inside, _RANGE.fullmatch(inside)
        self.count = inside.count(",") + 1
        if self._range is not None:
            self.count = abs(int(self._range[2]) - int(self._range[1])) + 1

    def __iter__(self) -> Iterator[str]:
        if self._range is None:
            yield from self._inside.split(",") if "," in self._inside else (f"{{{self._inside}}}",)
            return
        first, last = self._range.groups()
        padded = any(len(each) > 1 and each.startswith("0") for each in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        for number in range(int(first), int(last) + step, step):
            yield f"{number:0{width}}"
