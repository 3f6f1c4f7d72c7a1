"""The package's exceptions. Each message names the problem, the value, the limit and the remedy."""

import numbers
from collections.abc import Sequence
from typing import Any


class Florence2Error(ValueError):
    """Base class of all errors that wrong input causes. A bug in this package raises AssertionError instead."""


class ConfigError(Florence2Error):
    """A configuration file is missing, malformed, or describes something this project does not implement."""


class CheckpointError(Florence2Error):
    """Weights are missing or corrupt, have wrong shapes, or do not belong to the configuration next to them."""


class HubError(Florence2Error):
    """A checkpoint can be read neither from the Hugging Face Hub nor from its local cache."""


class ImageError(Florence2Error):
    """An image cannot be read, or is larger than the limit."""


class PromptError(Florence2Error):
    """A task is unknown, its input is missing or superfluous, or the prompt does not fit the model."""


class OptionError(Florence2Error):
    """A generation setting is unknown, out of range, or contradicts another."""


class OutputError(Florence2Error, OSError):
    """A file cannot be written, such as on a full disk. It is an OSError too, whose `strerror` is the reason alone."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.strerror = reason


MAX_LISTED = 20
"""The most problems of a checkpoint that one message lists."""


def listing(items: Sequence[str], separator: str = ", ", first: int = 8) -> str:
    """Return the first items of a list for a message, and how many more there are."""
    rest = [f"and {len(items) - first:,} more"] if len(items) > first else []
    return separator.join([*items[:first], *rest])


def shown(value: object, most: int = 60) -> str:
    """Return the repr of a value for a message, cut to `most` characters."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  an int of more than 4,300 digits has no repr, and a user's class may have a broken one
        text = f"a value of the type {type(value).__name__}"
    return clip(text, most)


def clip(text: object, most: int = 300) -> str:
    """Return a text for a message, such as that of a library's error, which may quote a whole file, cut to `most`."""
    whole = str(text)
    return whole if len(whole) <= most else whole[: most - 3] + "..."


def plain(value: Any) -> Any:
    """Return a number of NumPy, torch or another library as Python's, to be checked; anything else unchanged."""
    try:
        number = value.item() if getattr(value, "ndim", 1) == 0 else value  # an array or tensor without dimensions
        if isinstance(number, bool) or hasattr(number, "ndim"):
            return number
        if hasattr(number, "__index__"):
            return int(number.__index__())
        return float(number) if isinstance(number, numbers.Real) else value
    except Exception:  # noqa: BLE001  a tensor without values, a fraction beyond floats, a class of the user's
        return value
