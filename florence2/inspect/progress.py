"""The callback by which long computations report how far they are."""

from collections.abc import Callable
from typing import TypeAlias

ProgressCallback: TypeAlias = Callable[[int, int], None]
"""Called with (parts done, parts in total) after each part."""


def ignore_progress(_done: int, _total: int) -> None:
    """Stand in for a callback that was not given."""
