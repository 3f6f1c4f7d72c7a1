"""What options mean: checks of their values, and the model and the settings that they name."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence2.checkpoints.checks.functions import find_function
from florence2.checkpoints.hub import resolve, resolve_adapter
from florence2.cli.main import naming_options
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions

if TYPE_CHECKING:
    from florence2.asking.questions import Runtime
    from florence2.pipeline import Florence2

SAMPLING = ("sample", "temperature", "top_k", "top_p", "seed")
"""The options of sampling, which are settings of `GenerationOptions`."""
SETTINGS = {name: f"--{name.replace('_', '-')}" for name in ("max_new_tokens", *SAMPLING)} | {"num_beams": "--beams"}
"""The settings of `GenerationOptions` that have options, which messages name."""
_LOAD_OPTIONS = ("revision", "adapter", "device", "dtype", "attention", "allow_pickle", "background", "calibration")


def check_devices(options: argparse.Namespace) -> None:
    """Raise OptionError where both `--device` and `--devices` are given."""
    if options.devices and options.device != "auto":
        raise OptionError("--device and --devices were both given; leave one out.")


def check_at_least(options: argparse.Namespace, least: int, *names: str) -> None:
    """Raise OptionError for a number below `least`; None is allowed."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise OptionError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")


def generation_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the generation settings that differ from the model's own. Raises OptionError for a bad value."""
    given: dict[str, Any] = {"num_beams": options.beams, "max_new_tokens": options.max_new_tokens}
    given |= {name: getattr(options, name) for name in SAMPLING}
    given["confidence"] = vars(options).get("confidence")  # commands that need it have no such option
    changes = {name: value for name, value in given.items() if value is not None}
    with naming_options(SETTINGS):
        GenerationOptions().changed(**changes)
    return changes


def generation_options(options: argparse.Namespace, model: "Runtime") -> GenerationOptions:
    """Return the settings of the search: the model's own with those given. Raises OptionError where they conflict."""
    with naming_options(SETTINGS):
        return model.options(**generation_changes(options))


def resolve_model(name: str, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """Return the local path of a checkpoint, after fetching it if needed. Raises HubError for an unknown name."""
    return resolve(name, revision, allow_pickle=allow_pickle, report=say)


def say(line: str) -> None:
    """Print a line for people."""
    print(line, file=sys.stderr)


def check_model(options: argparse.Namespace) -> Path:
    """Return the path of the model that the options name, after fetching it and its adapter if needed.

    Raises HubError for an unknown name of either.
    """
    if getattr(options, "adapter", None) is not None:
        resolve_adapter(options.adapter)
    return resolve_model(options.model, options.revision, getattr(options, "allow_pickle", False))


def model_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `load` that `--change` and `--prepare` stand for.

    Raises OptionError when the function cannot be used (see `find_function`). This runs the code of its module.
    """
    return {"changes": dict(options.change), "prepare": options.prepare and find_function(options.prepare)}


def load_model(options: argparse.Namespace) -> "Florence2":
    """Load the model that the options name. An unknown name is refused before torch is imported.

    Raises a Florence2Error with the problem and the remedy.
    """
    check_model(options)
    from florence2.loading import load
    from florence2.modify import add_tasks

    given: dict[str, Any] = {name: value for name, value in vars(options).items() if name in _LOAD_OPTIONS}
    model = load(options.model, **given, **model_changes(options))
    return add_tasks(model, model.processor.tasks.declared(options.task_kind).own)
