"""The command line of the runtime without torch: `run` and `cascade`, with the words of `florence2`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from florence2.checkpoints.checks.calibration import calibration_digest, choose_calibration
from florence2.checkpoints.files import read_tasks
from florence2.cli.main import COMMANDS
from florence2.cli.main import main as run_main
from florence2.cli.options.arguments import check_at_least
from florence2.cli.options.groups import add_task_kind
from florence2.cli.options.values import name_argument
from florence2.cli.run import Backend, absolute
from florence2.inputs.tasks import Task, TaskTable
from florence2.lite.florence import Florence2Lite
from florence2.lite.layout import SUFFIXES
from florence2.lite.loading import check_folder, load

_MODULES = ("florence2.cli.run", "florence2.cli.cascade")
_PROGRAM = f"python -m {__package__}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command with an exported folder; return the exit code. See `florence2.cli.main.main`."""
    commands = {name: command for name, command in COMMANDS.items() if command.module in _MODULES}
    return run_main(arguments, commands, _PROGRAM, LITE)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=name_argument, required=True, metavar="DIR", help="a folder that `florence2 export` has written"
    )
    parser.add_argument("--provider", default="cpu", help="onnxruntime's provider: cpu, cuda, ... (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of an operation (default: onnxruntime's own)")
    parser.add_argument(
        "--kind",
        default="float32",
        choices=tuple(SUFFIXES),
        help="the type of the graphs, where a folder has several (default: float32, graphs without an ending)",
    )
    add_task_kind(parser)


def _tasks(options: argparse.Namespace, words: Sequence[str]) -> Mapping[str, Task]:  # noqa: ARG001
    """Return the tasks of the folder; an unknown one has none, and is reported when it is opened."""
    folder = Path(options.model)
    return TaskTable(read_tasks(folder) if folder.is_dir() else ()).declared(options.task_kind)


def _find(options: argparse.Namespace) -> Path:
    check_at_least(options, 1, "threads")
    return check_folder(options.model)


def _load(options: argparse.Namespace) -> Florence2Lite:
    model = load(
        options.model,
        provider=options.provider,
        threads=options.threads,
        kind=options.kind,
        background=options.background,
        calibration=options.calibration,
    )
    return model.with_tasks(options.task_kind)


def _settings(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    calibration = calibration_digest(choose_calibration(path, file=options.calibration))
    return {"model": absolute(options.model), "kind": options.kind, "calibration": calibration}


LITE = Backend(_PROGRAM, _add_options, _tasks, _find, _load, _settings, at_once="4 questions")
"""An exported folder in onnxruntime."""
