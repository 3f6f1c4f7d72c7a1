"""What the processes of a run agree on: who writes to its folder, its settings, and the step that it resumes from."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from florence2.bulk.lock import FolderLock
from florence2.checkpoints.files import describe_changes, read_json, write_json
from florence2.errors import ConfigError, OptionError

SETTINGS = "settings.json"
_MAY_CHANGE = ("save_every", "log_every", "workers", "gradient_checkpointing", "compile", "micro_batch")
"""Settings that a resumed run may change: none but the last two affects the weights, and those by rounding and by what
dropout draws. A run that ran out of memory must be able to resume."""


def be_quiet(line: str) -> None:
    """Say nothing."""


def lock_folder(
    folder: Path, accelerator: Accelerator, say: Callable[[str], None] = be_quiet
) -> AbstractContextManager[object]:
    """Make the folder and lock it for this run. Raises OptionError in every process when one of them cannot do so."""
    lock: FolderLock | None = None
    problem: OptionError | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder) if accelerator.is_main_process else None
    except OptionError as error:
        problem = error
    except OSError as error:
        problem = OptionError(f"{folder} cannot be written: {error.strerror or error}. Choose another folder.")
    if any_process(problem is not None, accelerator):
        if lock is not None:
            lock.release()
        raise problem or OptionError(f"Another process of this run cannot use {folder}; see its message.")
    if lock is not None and lock.note:
        say(lock.note)
    return lock or nullcontext()


def keep_settings(folder: Path, values: dict[str, Any], resumed: bool, accelerator: Accelerator) -> None:
    """Write the run's settings. A resumed run may change only settings that do not affect its weights."""
    path = folder / SETTINGS
    values = json.loads(json.dumps(values))  # as they will be read back: lists for tuples
    if resumed and path.is_file():
        changes = describe_changes(read_json(path), values, ignored=_MAY_CHANGE)
        if changes:
            raise ConfigError(
                f"{folder} holds a run with other settings ({changes}). Restore them or use another folder."
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(path, values)


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Return whether any process has the flag set; the answer is the same in all of them."""
    return bool(accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), reduction="sum"))


def check_same_step(first: int, folder: Path, accelerator: Accelerator) -> None:
    """Check that all processes have read the same state: each reads the folder itself."""
    steps = accelerator.gather(torch.tensor([first], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ConfigError(
            f"The processes would resume from different steps, {steps}: all machines must share the folder {folder}."
        )
