"""What lives in folders with dependencies of their own, found only when it is called."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from florence2.errors import OptionError


@dataclass(frozen=True)
class Extra:
    """One command of an extra: the module whose `main(arguments) -> exit code` runs it, and what installs it."""

    module: str
    extra: str
    help: str


EXTRAS: dict[str, Extra] = {
    "train": Extra("florence2.train.command", "train", "fine-tune a checkpoint on pictures with questions and answers"),
    "evaluate": Extra("florence2.train.evaluate_command", "train", "measure a checkpoint on questions with answers"),
    "audit": Extra("florence2.inspect.audit.command", "inspect", "measure a checkpoint's tensors, or compare two"),
    "inspect": Extra("florence2.inspect.command", "inspect", "answer one task on one picture and show why"),
}


def run_extra(name: str, arguments: Sequence[str]) -> int:
    """Run the command `name` of EXTRAS. Raises OptionError when a package that it needs is not installed."""
    found = EXTRAS[name]
    module = load_extra(found.module, found.extra, f"`florence2 {name}`")
    code: int = module.main(list(arguments))
    return code


def load_extra(module: str, extra: str, user: str) -> ModuleType:
    """The module of an extra. Raises OptionError, saying that `user` needs it, when a package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("florence2"):
            raise
        raise OptionError(
            f'{user} needs the package {error.name}, which is not installed: pip install "florence2[{extra}]".'
        ) from None
