"""`florence2 label IMAGES... --task TASK --out DIR`: answer tasks on any number of images, resumably, into a folder."""

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import partial

from florence2.bulk.questions import read_questions
from florence2.bulk.rows import TaskQuestion
from florence2.cli.main import parse_words
from florence2.cli.options import add_task_input, check_at_least, generation_changes, path_argument, say
from florence2.cli.run import TORCH, Backend, add_search, search_settings
from florence2.errors import OptionError, PromptError
from florence2.inputs.tasks import FreePrompt, Task
from florence2.label.counting import Counting, can_count
from florence2.label.devices import label_on_devices, parse_devices
from florence2.label.errors import parse_error_limit
from florence2.label.journal import Journal
from florence2.label.labelling import Labelling
from florence2.label.passed_over import PassedOver
from florence2.label.remaining import Remaining
from florence2.label.settings import weights_digest
from florence2.label.sources.opening import open_sources

MOST_WORKERS = 8
"""Decode workers where nobody says how many; at 13 ms for a JPEG of a camera they keep a fast GPU busy."""
_SHARD_LETTERS = 40  # of --shard, so that no number is too long for Python


def build_parser(backend: Backend = TORCH) -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog=f"{backend.program} label",
        usage=f"{backend.program} label [options] IMAGES... --task TASK --out DIR",
        description="Answer tasks on any number of images and write one row for each into DIR/results.jsonl. A run "
        "that was stopped, killed or cut short by a full disk is resumed by the same command; rows with errors are "
        "then tried again. A run that ends well leaves the rows in the order of the images. "
        f"Example: {backend.program} label photos/ --task od --out out",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="files, folders, patterns, lists (.txt), questions (.jsonl), tars and Parquet tables",
    )
    _add_questions(parser)
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="the folder for the rows")
    _add_work(parser)
    backend.add_options(parser)
    add_search(parser)
    return parser


def _add_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="TASK",
        help="the task for each image without questions of its own, such as od; repeatable",
    )
    add_task_input(parser)
    parser.add_argument(
        "--free-prompt", action="store_true", help="the tasks are free prompts, even if they are one word"
    )
    parser.add_argument("--image-column", metavar="NAME", help="the column of Parquet tables that holds the images")
    parser.add_argument("--id-column", metavar="NAME", help="the column of Parquet tables that holds the ids of rows")


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="do the I-th of N parts, 1/N to N/N, into DIR/results.I-of-N.jsonl; several may run at once",
    )
    parser.add_argument(
        "--devices",
        type=parse_devices,
        metavar="D,D",
        help="one process for each device, such as cuda:0,cuda:1; each does a shard of its own",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read images; 0 reads them in the process of the model "
        f"(default: one less than there are cores, at least 1 and at most {MOST_WORKERS})",
    )
    parser.add_argument(
        "--max-errors",
        type=parse_error_limit,
        metavar="N|P%",
        help="end the run when more than N rows, or P percent of at least 100, are errors (default: never)",
    )
    parser.add_argument(
        "--resume-by",
        choices=("place", "id"),
        default="place",
        help="how finished images are known: by paths and ids, or by ids alone, for images that were moved; by ids, a "
        "change of an image's file is not seen (default: place)",
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="answer nothing; put the rows of a run that was stopped in the order of the images, one for each question",
    )


def main(arguments: Sequence[str], backend: Backend = TORCH) -> int:
    """Label images; return the exit code."""
    options = parse_words(build_parser(backend), arguments)
    check_at_least(options, 1, "batch")
    check_at_least(options, 0, "workers")
    generation_changes(options)
    if options.workers is None:
        options.workers = max(1, min(_cores() - 1, MOST_WORKERS))
    if options.devices:
        if options.device != "auto":
            raise OptionError("--device and --devices were both given; leave one out.")
        backend.find(options)  # once, before the processes
        return label_on_devices(options, partial(_label, backend=backend))
    return _label(options, backend)


def _label(options: argparse.Namespace, backend: Backend) -> int:
    """Label images on one device; return the exit code."""
    known = backend.tasks(options, options.task)
    questions = _read_questions(options, known)
    passed_over = PassedOver()
    items = open_sources(
        options.images,
        image_column=options.image_column,
        id_column=options.id_column,
        output=options.out,
        passed_over=passed_over,
        shard=options.shard,
        known=known,
    )
    path = backend.find(options)  # before the folder is made, so that a misspelt name leaves nothing
    settings = search_settings(options) | backend.settings(options, path)
    settings["weights"] = weights_digest(path, options.allow_pickle)
    with Journal(options.out, settings, shard=options.shard, by=options.resume_by) as journal:
        for note in journal.notes:
            say(f"florence2: {note}")
        counting = Counting(items) if can_count(options.images) else None
        labelling = Labelling(options, backend, Remaining(items, questions, journal), journal, counting)
        code = labelling.compact() if options.compact else labelling.run()
    if passed_over.count:
        say(f"florence2: {passed_over.describe()}")
    return code


def _read_questions(options: argparse.Namespace, known: Mapping[str, Task]) -> list[TaskQuestion]:
    tasks = [FreePrompt(task) for task in options.task] if options.free_prompt else options.task
    if not tasks and (options.text or options.box):
        raise PromptError(f"{'--text' if options.text else '--box'} needs --task, the task that takes it.")
    return read_questions(tasks, options.text, options.box, known) if tasks else []


def parse_shard(text: str) -> tuple[int, int]:
    """Return (I, N) for "I/N". Raises ArgumentTypeError for anything else."""
    first, slash, last = text.partition("/")
    digits = slash and first.isdecimal() and last.isdecimal() and len(text) < _SHARD_LETTERS
    if not (digits and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(
            f"{text[:_SHARD_LETTERS]!r} is not a part; give I/N with I from 1 to N, such as 3/16"
        )
    return int(first), int(last)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
