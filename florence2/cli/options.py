"""Options that several commands share, so that each means the same everywhere, and how they become arguments."""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from florence2.bulk.questions import is_path
from florence2.checkpoints.checks.functions import find_function
from florence2.checkpoints.files import checkpoint_folder, read_tasks
from florence2.checkpoints.hub import (
    DEFAULT_MODEL,
    EMBEDDED_MODEL,
    NAMES,
    find_adapter,
    find_checkpoint,
    resolve,
    resolve_adapter,
)
from florence2.cli.main import naming_options
from florence2.errors import HubError, OptionError, PromptError
from florence2.generation.options import GenerationOptions
from florence2.inputs.image import parse_colour
from florence2.inputs.tasks import (
    AnswerKind,
    FreePrompt,
    Task,
    TaskTable,
    find_task,
    parse_task_kind,
)

if TYPE_CHECKING:
    from florence2.asking.questions import Runtime
    from florence2.pipeline import Florence2

DTYPES = ("float32", "float16", "bfloat16")
"""The keys of `florence2.checkpoints.checks.loading.DTYPES`, which needs torch."""
MODELS = f"{EMBEDDED_MODEL} (comes with the package), {', '.join(NAMES)}, OWNER/NAME, a folder or a file"
SAMPLING = ("sample", "temperature", "top_k", "top_p", "seed")
"""The options of sampling, which are settings of `GenerationOptions`."""
SETTINGS = {name: f"--{name.replace('_', '-')}" for name in ("max_new_tokens", *SAMPLING)} | {"num_beams": "--beams"}
"""The settings of `GenerationOptions` that have options, which messages name."""
_LOAD_OPTIONS = ("revision", "adapter", "device", "dtype", "attention", "allow_pickle", "background", "calibration")

# ---- groups of options ---------------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add which model, and where it computes."""
    parser.add_argument(
        "--model", type=name_argument, default=DEFAULT_MODEL, help=f"{MODELS} (default: {DEFAULT_MODEL})"
    )
    add_revision(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add_task_kind(parser)
    add_changes(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add which version of a model on the Hub."""
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: its main branch)")


def add_task_kind(parser: argparse.ArgumentParser) -> None:
    """Add the tasks that a fine-tuned model has and its files do not declare."""
    parser.add_argument(
        "--task-kind",
        action="append",
        default=[],
        type=_task_kind,
        metavar="NAME=KIND",
        help=f"a task that the model was fine-tuned on, such as VQA=text, when its tasks.json lacks it; KIND says how "
        f"answers are read: {', '.join(get_args(AnswerKind))}; the model reads the prompt as it is written, "
        '"<VQA>What colour is it?"; repeatable',
    )


def _task_kind(text: str) -> Task:
    try:
        return parse_task_kind(text)
    except PromptError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Add how the model differs from what its checkpoint says."""
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        type=parse_change,
        metavar="NAME=VALUE",
        help="load with another value of a setting, such as vision.window_size=8 or text.activation_function=silu; "
        "repeatable",
    )
    parser.add_argument(
        "--prepare",
        metavar="MODULE:FUNCTION",
        help="a Python function that changes the empty model before its weights are read, for checkpoints saved with "
        "prepare=; MODULE may be in the current folder",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add how the model's weights are loaded."""
    add_adapter(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="type of the weights (default: auto, float32 on a CPU and float16 elsewhere)",
    )
    parser.add_argument(
        "--attention",
        default="sdpa",
        choices=("sdpa", "eager"),
        help="torch's fused attention, or attention step by step (default: sdpa)",
    )
    add_pickle(parser)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add what turns confidences into frequencies."""
    parser.add_argument(
        "--calibration",
        type=path_argument,
        metavar="FILE",
        help="a file of `florence2 calibrate` (default: confidence.json next to the model's weights)",
    )


def add_min_confidence(parser: argparse.ArgumentParser) -> None:
    """Add the least confidence of a region."""
    parser.add_argument(
        "--min-confidence",
        type=parse_share,
        metavar="X",
        help="leave out boxes, quads and outlines below this confidence, 0 to 1 (default: leave out none)",
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add a LoRA adapter."""
    parser.add_argument(
        "--adapter",
        type=name_argument,
        metavar="DIR",
        help="a LoRA adapter to merge into the model: folder or OWNER/NAME",
    )


def add_pickle(parser: argparse.ArgumentParser) -> None:
    """Add the permission to read pickles."""
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read a .bin file when the checkpoint has no safetensors"
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add the settings of the search."""
    parser.add_argument(
        "--beams", type=int, metavar="N", help="beams of the search; 1 is greedy (default: the model's own setting)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer, in tokens (default: the model's own setting)"
    )
    # None where it is not given, as in the settings of an output folder
    parser.add_argument("--sample", action="store_true", default=None, help="draw each token at random, without beams")
    parser.add_argument("--temperature", type=float, metavar="X", help="of --sample: below 1 is surer (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="N", help="of --sample: draw from the N likeliest tokens alone")
    parser.add_argument("--top-p", type=float, metavar="X", help="of --sample: from the likeliest that sum to X alone")
    parser.add_argument("--seed", type=int, metavar="N", help="of --sample: the same answers every time, in any batch")


def add_input(parser: argparse.ArgumentParser) -> None:
    """Add the inputs of tasks, and free prompts."""
    add_task_input(parser)
    parser.add_argument(
        "--free-prompt",
        action="store_true",
        help="the first argument is a free prompt, which the model reads unchanged, even if it is one word or looks "
        "like a task",
    )


def add_task_input(parser: argparse.ArgumentParser) -> None:
    """Add the inputs of tasks."""
    parser.add_argument("--text", action="append", help="the text that a task takes; repeat it for several classes")
    parser.add_argument(
        "--box",
        action="append",
        metavar="X1,Y1,X2,Y2",
        type=parse_box,
        help="the region that a task takes: left, top, right, bottom in pixels (--box=-5,... if negative)",
    )


def add_background(parser: argparse.ArgumentParser) -> None:
    """Add the colour of transparent pixels."""
    parser.add_argument(
        "--background",
        type=_parse_background,
        metavar="COLOUR",
        help="the colour that transparent pixels of images show, such as white or #ffffff (default: transparency is "
        "dropped, as in the reference, and shows the colours under it)",
    )


def _parse_background(text: str) -> str:
    try:
        parse_colour(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add where a page or a JSON document goes."""
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="write a page, one self-contained HTML file")
    parser.add_argument("--json", action="store_true", help="JSON instead of a page in --out, or on stdout")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def path_argument(text: str) -> Path:
    """Return a path. Raises ArgumentTypeError for an empty one, which would mean the current folder."""
    return Path(name_argument(text))


def name_argument(text: str) -> str:
    """Return the name of a path or of a model. Raises ArgumentTypeError for an empty one."""
    if not text:
        raise argparse.ArgumentTypeError('the name is empty (""); is a variable of the shell not set?')
    return text


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


# ---- from options to arguments -------------------------------------------------------------------------------------


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


# ---- tasks and their inputs ----------------------------------------------------------------------------------------


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
