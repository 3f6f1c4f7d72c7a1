"""Values of options, each from the text that a user gives to what it means.

Each function raises ArgumentTypeError, with a sentence, for a text that means nothing.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from florence2.errors import OptionError, PromptError
from florence2.inputs.image import parse_colour
from florence2.inputs.tasks import Task, parse_task_kind


def name_argument(text: str) -> str:
    """Return the name of a path or of a model. Raises ArgumentTypeError for an empty one."""
    if not text:
        raise argparse.ArgumentTypeError('the name is empty (""); is a variable of the shell not set?')
    return text


def path_argument(text: str) -> Path:
    """Return a path. Raises ArgumentTypeError for an empty one, which would mean the current folder."""
    return Path(name_argument(text))


def parse_box(text: str) -> tuple[float, ...]:
    """Return the four numbers of a box. Raises ArgumentTypeError for anything else."""
    try:
        box = tuple(float(part) for part in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] > box[2] or box[1] > box[3]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a box; give four numbers X1,Y1,X2,Y2 in pixels, with X1 <= X2 and Y1 <= Y2"
        )
    return box


def parse_share(text: str) -> float:
    """Return a number from 0 to 1. Raises ArgumentTypeError for anything else."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return share


def parse_change(text: str) -> tuple[str, Any]:
    """Return name and value of a changed setting; a value that is not JSON is a text.

    Raises ArgumentTypeError where there is no "=".
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not a change; give NAME=VALUE, such as vision.window_size=8")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_devices(text: str) -> list[str]:
    """Return the names in "cuda:0,cuda:1". Raises ArgumentTypeError for an empty one."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of devices, such as cuda:0,cuda:1")
    return names


def parse_task(text: str) -> Task:
    """Return the task in "NAME=KIND". Raises ArgumentTypeError for anything else."""
    try:
        return parse_task_kind(text)
    except PromptError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_background(text: str) -> str:
    """Return the name of a colour. Raises ArgumentTypeError for an unknown one."""
    try:
        parse_colour(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
