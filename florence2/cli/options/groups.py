"""Options that several commands share, so that each means the same everywhere."""

import argparse
from typing import get_args

from florence2.checkpoints.hub import DEFAULT_MODEL, EMBEDDED_MODEL, NAMES
from florence2.cli.options.values import (
    name_argument,
    parse_background,
    parse_box,
    parse_change,
    parse_devices,
    parse_share,
    parse_task,
    path_argument,
)
from florence2.inputs.tasks import AnswerKind

DTYPES = ("float32", "float16", "bfloat16")
"""The keys of `florence2.checkpoints.checks.loading.DTYPES`, which needs torch."""
MODELS = f"{EMBEDDED_MODEL} (comes with the package), {', '.join(NAMES)}, OWNER/NAME, a folder or a file"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add which model, and where it computes."""
    parser.add_argument(
        "--model", type=name_argument, default=DEFAULT_MODEL, help=f"{MODELS} (default: {DEFAULT_MODEL})"
    )
    add_revision(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add_task_kind(parser)
    add_changes(parser)


def add_devices(parser: argparse.ArgumentParser, help: str) -> None:
    """Add several devices, each with a process of its own; `help` says which work it does."""
    parser.add_argument("--devices", type=parse_devices, metavar="D,D", help=help)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add which version of a model on the Hub."""
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: its main branch)")


def add_task_kind(parser: argparse.ArgumentParser) -> None:
    """Add the tasks that a fine-tuned model has and its files do not declare."""
    parser.add_argument(
        "--task-kind",
        action="append",
        default=[],
        type=parse_task,
        metavar="NAME=KIND",
        help=f"a task that the model was fine-tuned on, such as VQA=text, when its tasks.json lacks it; KIND says how "
        f"answers are read: {', '.join(get_args(AnswerKind))}; the model reads the prompt as it is written, "
        '"<VQA>What colour is it?"; repeatable',
    )


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


def add_confidence(parser: argparse.ArgumentParser) -> None:
    """Add the least confidence of a region, or that none is computed."""
    either = parser.add_mutually_exclusive_group()
    add_min_confidence(either)
    # None where it is not given, as in the settings of an output folder
    either.add_argument(
        "--no-confidence",
        dest="confidence",
        action="store_false",
        default=None,
        help="compute no confidences, which saves a second reading of each answer",
    )


def add_min_confidence(parser: argparse._ActionsContainer) -> None:
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
        type=parse_background,
        metavar="COLOUR",
        help="the colour that transparent pixels of images show, such as white or #ffffff (default: transparency is "
        "dropped, as in the reference, and shows the colours under it)",
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add where a page or a JSON document goes."""
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="write a page, one self-contained HTML file")
    parser.add_argument("--json", action="store_true", help="JSON instead of a page in --out, or on stdout")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
