"""`florence2 run TASK... IMAGE...`: answer tasks on images. `cascade` shares the second half."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from florence2.bulk.journal import Folder
from florence2.bulk.rows import Question, Result, Row, TaskQuestion
from florence2.bulk.sources import find_images
from florence2.checkpoints.hub import NAMES
from florence2.cli.main import EXIT_SOME_FAILED, EXIT_STOPPED
from florence2.cli.options import (
    SAMPLING,
    add_background,
    add_generation,
    add_input,
    add_model,
    add_weights,
    check_at_least,
    check_order,
    generation_changes,
    load_model,
    model_tasks,
    names_task,
    read_questions,
)
from florence2.cli.progress import Progress
from florence2.errors import OptionError, PromptError
from florence2.generation.options import GenerationOptions
from florence2.inputs.tasks import TASKS, FreePrompt, Task

if TYPE_CHECKING:
    from florence2.pipeline import EncodedImage, Florence2, Request

Q = TypeVar("Q", bound=Question)


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    names = ", ".join(task.alias for task in TASKS.values())
    parser = argparse.ArgumentParser(
        prog="florence2 run",
        usage="florence2 run [options] TASK... IMAGE...",
        description=f"Answer one or more tasks on images. Tasks: {names}, and those in tasks.json of the model; or a "
        "free prompt of more than one word, or of any form with --free-prompt. "
        "With several boxes, each box is a question of its own. "
        'Example: florence2 run "<OD>" photo.jpg',
    )
    parser.add_argument(
        "arguments", nargs="+", metavar="TASK... IMAGE...", help="tasks first, then files, folders, or - for stdin"
    )
    add_input(parser)
    add_answering(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Answer tasks on images; return the exit code."""
    options = build_parser().parse_args(arguments)
    if options.free_prompt:
        options.arguments[0] = FreePrompt(options.arguments[0])
    known = model_tasks(options, options.arguments[0])
    check_order("run", options.arguments, known)
    tasks, images = split_arguments(options.arguments, known)
    return answer_all(options, images, read_questions(tasks, options.text, options.box, known), _ask)


def split_arguments(arguments: Sequence[str], known: Mapping[str, Task] = TASKS) -> tuple[list[str], list[str]]:
    """Split the arguments into tasks and images.

    The first is a task or a free prompt; so is each next one that names a `known` task, up to the first that does not.
    Raises PromptError when no image is left.
    """
    count = 1
    while count < len(arguments) and names_task(arguments[count], known) and not Path(arguments[count]).exists():
        count += 1
    if count == len(arguments):
        raise PromptError("Which image? Give files, folders, or - for stdin, after the task.")
    return list(arguments[:count]), list(arguments[count:])


def _ask(
    model: "Florence2", options: GenerationOptions, pairs: Sequence[tuple["EncodedImage", TaskQuestion]]
) -> Sequence[Result]:
    """Answer all pairs as one batch."""
    requests: list[Request] = [(question.task, image, question.text) for image, question in pairs]
    return model.run_batch(requests, options=options, batch_size=len(requests))


# ---- shared with `cascade` -----------------------------------------------------------------------------------------


def add_answering(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that answers questions about images."""
    add_model(parser)
    add_weights(parser)
    add_background(parser)
    add_generation(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images computed at once (default: 1)")
    parser.add_argument("--json", action="store_true", help="JSON Lines instead of text on stdout")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write DIR/results.jsonl; an unfinished run there is resumed"
    )
    parser.add_argument("--draw", action="store_true", help="also draw each answer on a copy of its image, in --out")


def answer_all(
    options: argparse.Namespace,
    images: Sequence[str],
    questions: Sequence[Q],
    ask: Callable[["Florence2", GenerationOptions, Sequence[tuple["EncodedImage", Q]]], Sequence[Result]],
) -> int:
    """Ask every question about every image, and write each row to stdout and to `--out`; return the exit code.

    `ask` answers (image, question) pairs together.
    """
    if options.draw and options.out is None:
        raise OptionError("--draw needs --out DIR, the folder for the drawn images.")
    check_at_least(options, 1, "batch")
    changes, sources = generation_changes(options), find_images(images)
    folder = _open_folder(options) if options.out is not None else None
    console = Console(options.json, headings=len(sources) * len(questions) > 1)
    with folder or nullcontext():
        model = load_model(options)
        from florence2.bulk.answering import answer_images  # which needs torch

        search, progress = model.options(**changes), Progress()
        rows = answer_images(
            model,
            sources,
            questions,
            lambda pairs: ask(model, search, pairs),
            batch_size=options.batch,
            done=folder.done if folder else frozenset(),
            progress=progress,
        )
        kept = f"; finished answers are kept in {options.out}" if folder else ""
        return _write_rows(rows, [console, folder] if folder else [console], progress, kept)


def _open_folder(options: argparse.Namespace) -> Folder:
    """Open `--out`; say how many answers it holds."""
    folder = Folder(options.out, options.draw, _settings(options))
    if folder.done:
        print(f"florence2: {options.out}/results.jsonl already holds {len(folder.done)} answers.", file=sys.stderr)
    return folder


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all answers of a run depend on, besides image and question."""
    names = ("revision", "dtype", "attention", "beams", "max_new_tokens", "prepare", "background", *SAMPLING)
    model = options.model if options.model in NAMES else _absolute(options.model)
    adapter = _absolute(options.adapter) if options.adapter else None
    changes = dict(options.change) or None
    return {"model": model, "adapter": adapter, "changes": changes} | {name: getattr(options, name) for name in names}


def _absolute(name: str) -> str:
    """Return an existing path as an absolute one, and a name on the Hub unchanged."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _write_rows(rows: Iterable[Row], writers: Sequence[Callable[[Row], None]], progress: Progress, kept: str) -> int:
    """Hand each row to every writer as it comes; return the exit code."""
    failed = 0
    try:
        with progress:
            for row in rows:
                for write in writers:
                    write(row)
                failed += row.error is not None
    except KeyboardInterrupt:
        print(f"\nflorence2: stopped after {progress.done} of {progress.total} images{kept}.", file=sys.stderr)
        return EXIT_STOPPED
    return EXIT_SOME_FAILED if failed else 0


class Console:
    """Rows on stdout, as text for people or as JSON Lines for programs; failures as text on stderr."""

    def __init__(self, as_json: bool, headings: bool):
        self.as_json, self.headings = as_json, headings

    def __call__(self, row: Row) -> None:
        """Print one row."""
        if self.as_json:
            unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
            print(json.dumps(row.to_dict(), ensure_ascii=not unicode), flush=True)
        elif row.error is not None:
            name = "" if row.source.name in row.error else f"{row.source.name}: "
            print(f"florence2: {name}{row.error}", file=sys.stderr)
        else:
            if self.headings:
                print(f"== {row.source.name}  {row.question.name}")
            print(row.answer, flush=True)
