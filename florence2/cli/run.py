"""`florence2 run TASK... IMAGE...`: answer tasks on images. `cascade` shares the second half."""

import argparse
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from florence2.asking.questions import Runtime
from florence2.asking.requests import EncodedImage
from florence2.bulk.answering import Arrival, Ask, Rows, answer_images
from florence2.bulk.journal import Folder, check_folder
from florence2.bulk.questions import check_order, holds_task, is_path, read_questions
from florence2.bulk.rows import Question, Result, Row, RowKey, TaskQuestion
from florence2.bulk.sources import PassedOver, Source, find_images, find_unreadable
from florence2.bulk.summary import Summary
from florence2.checkpoints.checks.calibration import calibration_digest, choose_calibration
from florence2.checkpoints.files import checkpoint_folder
from florence2.checkpoints.hub import NAMES, find_adapter
from florence2.cli.main import EXIT_INCOMPLETE, EXIT_STOPPED, name_options, parse_words
from florence2.cli.options.arguments import (
    SAMPLING,
    SETTINGS,
    check_at_least,
    check_model,
    generation_changes,
    generation_options,
    load_model,
    say,
)
from florence2.cli.options.groups import (
    add_background,
    add_calibration,
    add_confidence,
    add_generation,
    add_input,
    add_model,
    add_weights,
)
from florence2.cli.options.tasks import model_tasks
from florence2.cli.options.values import path_argument
from florence2.cli.progress import Console, Progress
from florence2.errors import Florence2Error, OptionError, PromptError
from florence2.generation.options import GenerationOptions
from florence2.inputs.tasks import TASKS, FreePrompt, Task

Q = TypeVar("Q", bound=Question)
AskModel: TypeAlias = Callable[
    [Runtime, GenerationOptions, Iterable[tuple[EncodedImage, Q] | Florence2Error], int | None, Arrival],
    Iterator[Result | Florence2Error],
]
"""A function that answers pairs with a model, a number of them at once; errors keep their places."""


@dataclass(frozen=True)
class Backend:
    """What answers the questions of a command, and how a command line chooses it.

    Attributes:
        program: How the command line is called.
        add_options: Adds the options that choose a model, and how it computes.
        tasks: Returns the tasks of the chosen model, without loading it, as far as some words may be such.
        find: Returns the path of the chosen model. Raises a Florence2Error for an unknown one.
        load: Loads the chosen model.
        settings: Returns what all answers of the model at a path depend on, besides image and question.
        at_once: How many are answered at once by default, in words.
    """

    program: str
    add_options: Callable[[argparse.ArgumentParser], None]
    tasks: Callable[[argparse.Namespace, Sequence[str]], Mapping[str, Task]]
    find: Callable[[argparse.Namespace], Path]
    load: Callable[[argparse.Namespace], Runtime]
    settings: Callable[[argparse.Namespace, Path], dict[str, Any]]
    at_once: str = "as memory allows"


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_weights(parser)


def _settings(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    adapter = absolute(options.adapter) if options.adapter else None
    changes = dict(options.change) or None
    merged = None if options.adapter is None else find_adapter(options.adapter)
    # by content, because the file of a name may change between two runs
    calibration = calibration_digest(
        choose_calibration(checkpoint_folder(path), merged, options.calibration, changes, options.prepare)
    )
    model = options.model if options.model in NAMES else absolute(options.model)
    given = {name: getattr(options, name) for name in ("revision", "dtype", "attention", "prepare")}
    return {"model": model, "adapter": adapter, "changes": changes, "calibration": calibration, **given}


TORCH = Backend("florence2", _add_options, model_tasks, check_model, load_model, _settings)
"""A checkpoint in torch."""


def build_parser(backend: Backend = TORCH) -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    names = ", ".join(task.alias for task in TASKS.values())
    parser = argparse.ArgumentParser(
        prog=f"{backend.program} run",
        usage=f"{backend.program} run [options] TASK... IMAGE...",
        description=f"Answer one or more tasks on images. Tasks: {names}, and those in tasks.json of the model or of "
        "--task-kind; or a free prompt: more than one word and not a task's name, or of any form with --free-prompt. "
        "With several boxes, each box is a question of its own. "
        "A confidence is how probable it is that label and place are right, 0 to 1; raw where the model was not "
        "calibrated (see `florence2 calibrate`). "
        f'Example: {backend.program} run "<OD>" photo.jpg',
    )
    parser.add_argument(
        "arguments", nargs="+", metavar="TASK... IMAGE...", help="tasks first, then files, folders, or - for stdin"
    )
    add_input(parser)
    add_answering(parser, backend)
    return parser


def main(arguments: Sequence[str], backend: Backend = TORCH) -> int:
    """Answer tasks on images; return the exit code."""
    options = parse_words(build_parser(backend), arguments)
    if options.free_prompt:
        options.arguments[0] = FreePrompt(options.arguments[0])
    known = backend.tasks(options, options.arguments)
    check_order("run", options.arguments, known, backend.program)
    tasks, images = split_arguments(options.arguments, known)
    return answer_all(options, images, read_questions(tasks, options.text, options.box, known), ask_tasks, backend)


def split_arguments(arguments: Sequence[str], known: Mapping[str, Task] = TASKS) -> tuple[list[str], list[str]]:
    """Split the arguments into tasks and images.

    The first is a task or a free prompt; each next one is a task, with its input or without, up to the first that
    is not or that is a file. Raises PromptError when no image is left.
    """
    count = 1
    while count < len(arguments) and holds_task(arguments[count], known) and not is_path(arguments[count]):
        count += 1
    if count == len(arguments):
        raise PromptError("Which image? Give files, folders, or - for stdin, after the task.")
    return list(arguments[:count]), list(arguments[count:])


def ask_tasks(
    model: Runtime,
    options: GenerationOptions,
    pairs: Iterable[tuple[EncodedImage, TaskQuestion] | Florence2Error],
    batch_size: int | None,
    arrived: Arrival,
) -> Iterator[Result | Florence2Error]:
    """Answer `batch_size` pairs at once."""
    requests = (pair if isinstance(pair, Florence2Error) else (pair[1].task, pair[0], pair[1].text) for pair in pairs)
    return model.stream(requests, options=options, batch_size=batch_size, arrived=arrived)


# ---- shared with `cascade` -----------------------------------------------------------------------------------------


def add_answering(parser: argparse.ArgumentParser, backend: Backend = TORCH) -> None:
    """Add the options of a command that answers questions about images."""
    backend.add_options(parser)
    parser.add_argument("--batch", type=int, metavar="N", help=f"images answered at once (default: {backend.at_once})")
    add_search(parser)
    parser.add_argument("--json", action="store_true", help="JSON Lines instead of text on stdout")
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="also write DIR/results.jsonl; an unfinished run there is resumed",
    )
    parser.add_argument("--draw", action="store_true", help="also draw each answer on a copy of its image, in --out")


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add what shapes the answers, besides the model."""
    add_calibration(parser)
    add_background(parser)
    add_generation(parser)
    add_confidence(parser)


def answer_all(
    options: argparse.Namespace,
    images: Sequence[str],
    questions: Sequence[Q],
    ask: AskModel[Q],
    backend: Backend = TORCH,
) -> int:
    """Ask every question about every image, and write each row to `--out` and to stdout; return the exit code.

    `ask` answers (image, question) pairs as it has room for them.
    """
    _check(options)
    generation_changes(options)
    passed_over = PassedOver()
    sources = find_images(images, passed_over=passed_over, output=options.out)
    path = backend.find(options)  # before the folder is made, so that a misspelt name leaves nothing
    if passed_over.count:
        say(f"florence2: {passed_over.describe()}")
    requested = [Row(source, question) for source in sources for question in questions]
    folder = _open_folder(options, backend, path, requested) if options.out is not None else None
    headings = len(sources) * len(questions) > 1 or any(os.path.isdir(image) for image in images)  # noqa: PTH112
    console = Console(options.json, headings, needed=folder is None)
    summary, progress = Summary(options.max_new_tokens, passed_over.count), Progress()
    with folder or nullcontext():
        if folder is not None:
            summary.add_earlier(folder.earlier)
            _draw_earlier(folder, console, summary)
        left = [row for row in requested if folder is None or row.key not in folder.done]
        rows = _refuse_unreadable(left)
        if left and not rows:
            done = folder.done if folder else frozenset()
            rows = _answer(options, backend, sources, questions, ask, done, progress)
        return _write_rows(rows, folder, console, summary, progress)


def _check(options: argparse.Namespace) -> None:
    """Refuse wrong options before any file is read."""
    if options.draw and options.out is None:
        raise OptionError("--draw needs --out DIR, the folder for the drawn images.")
    if options.out is not None:
        check_folder(options.out)
    check_at_least(options, 1, "batch")


def _open_folder(options: argparse.Namespace, backend: Backend, path: Path, requested: Sequence[Row]) -> Folder:
    """Open `--out`; say how many answers it holds."""
    settings = search_settings(options) | backend.settings(options, path)
    folder = Folder(options.out, options.draw, settings, requested)
    for note in folder.notes:
        say(f"florence2: {note}")
    if folder.done:
        say(
            f"florence2: {folder.results} already holds {len(folder.done)} answers; they are not computed or printed "
            "again."
        )
    return folder


def _draw_earlier(folder: Folder, console: "Console", summary: Summary) -> None:
    """Draw the answers of earlier runs that `--draw` now wants drawn."""
    if folder.draw:
        with Progress(things="drawings") as progress:
            failed = folder.draw_earlier(progress)
        for row in failed:
            console.report_drawing(row)
            summary.add_drawing(row)


def _refuse_unreadable(left: Iterable[Row]) -> Iterable[Row]:
    """Return all rows with their errors if no image of theirs can be read, which needs no model; else nothing."""
    errors = find_unreadable(dict.fromkeys(row.source for row in left))
    return [replace(row, error=errors[row.source]) for row in left] if errors else []


def _answer(
    options: argparse.Namespace,
    backend: Backend,
    sources: Sequence[Source],
    questions: Sequence[Q],
    ask: AskModel[Q],
    done: Collection[RowKey],
    progress: Progress,
) -> Iterable[Row]:
    """Load the model and return the rows, which are computed as they are taken."""
    model = backend.load(options)
    slots = None if options.batch is None else options.batch * len(questions)
    return answer_images(
        model,
        sources,
        questions,
        finishing(ask, model, options, slots),
        batch_size=options.batch,
        done=done,
        progress=progress,
    )


def finishing(ask: AskModel[Q], model: Runtime, options: argparse.Namespace, slots: int | None) -> Ask[Q]:
    """Return `ask` with a model and the settings of a command line; errors name options, and weak regions are left out.

    Raises OptionError where the settings conflict.
    """
    search = generation_options(options, model)

    def finish(result: Result | Florence2Error) -> Result | Florence2Error:
        if isinstance(result, OptionError):  # such as of an answer that would take too much memory
            return OptionError(name_options(str(result), SETTINGS))
        if isinstance(result, Florence2Error) or options.min_confidence is None:
            return result
        return result.with_confidence(options.min_confidence)

    def ask_model(
        pairs: Iterable[tuple[EncodedImage, Q] | Florence2Error], arrived: Arrival
    ) -> Iterator[Result | Florence2Error]:
        return map(finish, ask(model, search, pairs, slots, lambda number, result: arrived(number, finish(result))))

    return ask_model


def search_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the answers of a run depend on with every backend."""
    kinds = {task.token: task.answer for task in options.task_kind} or None
    names = ("beams", "max_new_tokens", "background", "confidence", "min_confidence", *SAMPLING)
    return {"task_kind": kinds} | {name: getattr(options, name) for name in names}


def absolute(name: str) -> str:
    """Return an existing path as an absolute one, and a name on the Hub unchanged."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _write_rows(
    rows: Iterable[Row], folder: Folder | None, console: "Console", summary: Summary, progress: Progress
) -> int:
    """Write each row as it comes, to the folder first; then say how the run went. Return the exit code."""
    stopped = False

    def keep(row: Row) -> None:
        kept = row if folder is None else folder(row)
        console(kept)
        summary.add(kept)

    try:
        with progress:
            for row in rows:
                keep(row)
    except KeyboardInterrupt:
        stopped = True
        for row in rows.waiting() if isinstance(rows, Rows) else ():
            keep(row)
        where = f"; the rows written so far are kept in {folder.path}" if folder else ""
        say(f"\nflorence2: stopped after {progress.done} of {progress.total} images{where}.")
    for sentence in (*summary.sentences(), *console.problems):
        say(f"florence2: {sentence}")
    if stopped:
        return EXIT_STOPPED
    return 0 if summary.complete and not console.problems else EXIT_INCOMPLETE
