"""`florence2 label IMAGES... --task TASK --out DIR`: answer tasks on any number of images, resumably, into a folder."""

import argparse
from collections.abc import Mapping, Sequence

from florence2.bulk.questions import read_questions
from florence2.bulk.rows import TaskQuestion
from florence2.bulk.sources import PassedOver
from florence2.cli.main import parse_words
from florence2.cli.options.arguments import check_at_least, generation_changes, say
from florence2.cli.options.groups import add_task_input
from florence2.cli.options.values import path_argument
from florence2.cli.run import TORCH, add_search
from florence2.errors import PromptError
from florence2.inputs.tasks import FreePrompt, Task
from florence2.label.counting import Counting
from florence2.label.devices import label_on_devices
from florence2.label.journal import Journal
from florence2.label.labelling import Labelling
from florence2.label.options import add_work, check_work
from florence2.label.remaining import Remaining
from florence2.label.settings import run_settings
from florence2.label.sources.opening import open_sources


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 label",
        usage="florence2 label [options] IMAGES... --task TASK --out DIR",
        description="Answer tasks on any number of images and write one row for each into DIR/results.jsonl. A run "
        "that was stopped, killed or cut short by a full disk is resumed by the same command; rows with errors are "
        "then tried again. A run that ends well leaves the rows in the order of the images. "
        "Example: florence2 label photos/ --task od --out out",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="files, folders, patterns, lists (.txt), questions (.jsonl), tars and Parquet tables",
    )
    _add_questions(parser)
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="the folder for the rows")
    _add_running(parser)
    TORCH.add_options(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="answers computed at once (default: as memory allows)")
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
    parser.add_argument(
        "--image-column",
        metavar="NAME",
        help="the column of Parquet tables that holds the images; in tars, the extension of the images to take, such "
        "as jpg, or several with ; between them",
    )
    parser.add_argument("--id-column", metavar="NAME", help="the column of Parquet tables that holds the ids of rows")


def _add_running(parser: argparse.ArgumentParser) -> None:
    add_work(
        parser,
        shard="do the I-th of N parts, 1/N to N/N, into DIR/results.I-of-N.jsonl; several may run at once",
    )
    parser.add_argument(
        "--resume-by",
        choices=("place", "id"),
        default="place",
        help="how finished images are recognised: by path and id, or by id alone, for images that were moved; by id, a "
        "change of an image's file goes unnoticed (default: place)",
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="answer nothing; put the rows of a run that was stopped in the order of the images, one for each "
        "question, and take out errors about images that are not named any more",
    )


def main(arguments: Sequence[str]) -> int:
    """Label images; return the exit code."""
    options = parse_words(build_parser(), arguments)
    check_at_least(options, 1, "batch")
    check_work(options)
    generation_changes(options)
    if options.devices:
        TORCH.find(options)  # once, before the processes
        return label_on_devices(options, _label)
    return _label(options)


def _label(options: argparse.Namespace) -> int:
    """Label images on one device; return the exit code."""
    known = TORCH.tasks(options, options.task)
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
    path = TORCH.find(options)  # before the folder is made, so that a misspelt name leaves nothing
    settings = run_settings(options, TORCH, path)
    with Journal(options.out, settings, shard=options.shard, by=options.resume_by) as journal:
        for note in journal.notes:
            say(f"florence2: {note}")
        counting = Counting(items) if items.are_listed else None
        labelling = Labelling(options, TORCH.load, Remaining(items, questions, journal), journal, counting)
        code = labelling.compact() if options.compact else labelling.run()
    if passed_over.count:
        say(f"florence2: {passed_over.describe()}")
    return code


def _read_questions(options: argparse.Namespace, known: Mapping[str, Task]) -> list[TaskQuestion]:
    tasks = [FreePrompt(task) for task in options.task] if options.free_prompt else options.task
    if not tasks and (options.text or options.box):
        raise PromptError(f"{'--text' if options.text else '--box'} needs --task, the task that takes it.")
    return read_questions(tasks, options.text, options.box, known) if tasks else []
