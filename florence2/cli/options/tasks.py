"""The tasks that a command line can name, those of a fine-tuned model included, before the model is loaded."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from florence2.bulk.questions import is_path
from florence2.checkpoints.files import checkpoint_folder, read_tasks
from florence2.checkpoints.hub import NAMES, find_adapter, find_checkpoint
from florence2.cli.options.arguments import check_model
from florence2.errors import HubError
from florence2.inputs.tasks import FreePrompt, TaskTable, find_task

_ALIAS = re.compile(r"[a-z][\w-]*", re.ASCII | re.IGNORECASE)
"""One word in the form of an alias."""


def model_tasks(options: argparse.Namespace, words: Sequence[str]) -> TaskTable:
    """Return the tasks of the model that the options name, those of `--task-kind` included, without loading it.

    A model or adapter that is not on this machine is fetched if one of the `words` may be a task of its own. An
    unknown name has no tasks; it is reported when the model is loaded. Raises ConfigError for a damaged `tasks.json`.
    """
    declared = TaskTable().declared(options.task_kind)
    try:
        path = find_checkpoint(options.model, options.revision, getattr(options, "allow_pickle", False))
    except HubError:
        return declared
    adapter = getattr(options, "adapter", None)
    if any(_may_be_own(word, declared) for word in words) and (
        adapter is not None or (path is None and options.model not in NAMES)
    ):
        path = check_model(options)
    if path is None:
        return declared
    return stored_tasks(options, path)


def _may_be_own(word: str, tasks: TaskTable) -> bool:
    """Return whether a word may be a task that only the model's files know."""
    if isinstance(word, FreePrompt) or find_task(word, tasks) is not None or is_path(word):
        return False
    return word.startswith("<") or _ALIAS.fullmatch(word) is not None


def stored_tasks(options: argparse.Namespace, path: Path) -> TaskTable:
    """Return the tasks of the checkpoint at `path`, of `--adapter` as far as it is here, and of `--task-kind`.

    Raises ConfigError or PromptError where they contradict each other.
    """
    adapter = getattr(options, "adapter", None)
    folder = None if adapter is None else find_adapter(adapter)
    return TaskTable(read_tasks(checkpoint_folder(path), folder)).declared(options.task_kind)
