"""`florence2 inspect TASK IMAGE`: one answer and what led to it, as a page, as JSON, as plots."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from florence2.bulk.questions import check_order, read_questions
from florence2.bulk.rows import TaskQuestion
from florence2.cli.main import naming_options, require_extra
from florence2.cli.options.arguments import SETTINGS, generation_changes, generation_options, load_model
from florence2.cli.options.groups import add_background, add_generation, add_input, add_model, add_report
from florence2.cli.options.tasks import model_tasks
from florence2.cli.options.values import path_argument
from florence2.cli.progress import Progress
from florence2.errors import OptionError, PromptError
from florence2.inputs.files import is_url
from florence2.inputs.image import open_image
from florence2.inputs.tasks import FreePrompt
from florence2.inspect.out_file import check_out, write_out


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 inspect",
        description="Answer one task on one image and show why: where each token attends, what each layer predicts, "
        "which alternatives were likely, and how the search went. "
        'Example: florence2 inspect "<CAPTION>" photo.jpg --out report.html',
    )
    parser.add_argument("task", metavar="TASK", help="a task's token or alias, or a free prompt")
    parser.add_argument("image", type=_parse_image, metavar="IMAGE", help="an image file")
    add_input(parser)
    add_background(parser)
    add_report(parser)
    parser.add_argument("--plots", type=path_argument, metavar="DIR", help="also plot every token, as PNG and SVG")
    parser.add_argument(
        "--saliency",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure what each token depends on, by a backward pass through the whole model for each; this takes "
        "most of the time (default: on)",
    )
    add_model(parser)
    add_generation(parser)
    return parser


def _parse_image(text: str) -> Path | str:
    return text if is_url(text) else path_argument(text)  # a Path would change a URL


def main(arguments: Sequence[str]) -> int:
    """Answer one task on one image, and write why: the page or the JSON of `--out`, and `--plots`.

    Prints the names of what was written, or the JSON itself when no file is given for it.

    Returns:
        0.

    Raises:
        Florence2Error: The input is unusable; found before a model is loaded where possible.
    """
    options = build_parser().parse_args(arguments)
    question, plots = _check(options), _load_plots() if options.plots else None
    values = _explain(options, question)
    if options.json and options.out is None:
        print(json.dumps(values, allow_nan=False))
    elif options.out is not None:
        write_out(options.out, json.dumps(values, allow_nan=False) if options.json else _render(values))
        print(options.out)
    if plots is not None:
        _write_plots(plots, values, options.plots)
        print(options.plots, file=sys.stderr if options.json and options.out is None else sys.stdout)
    return 0


def _check(options: argparse.Namespace) -> TaskQuestion:
    """Refuse what cannot work before the slow part begins; return the question."""
    if options.free_prompt:
        options.task = FreePrompt(options.task)
    tasks = model_tasks(options, [options.task])
    check_order("inspect", [options.task, str(options.image)], tasks)
    if options.out is None and options.plots is None and not options.json:
        raise OptionError("Where should the explanation go? Give --out report.html, --plots DIR or --json.")
    if options.out is not None:
        check_out(options.out, options.overwrite)
    if options.plots is not None and options.plots.exists() and not options.plots.is_dir():
        raise OptionError(f"{options.plots} is a file; --plots needs a folder.")
    generation_changes(options)
    question, *more = read_questions([options.task], options.text, options.box, tasks)
    if more:
        raise PromptError(f"--box is given {1 + len(more)} times, but only one answer can be explained; give one box.")
    open_image(options.image)
    return question


def _explain(options: argparse.Namespace, question: TaskQuestion) -> dict[str, Any]:
    model = load_model(options)
    from florence2.inspect.explanation import explain  # which needs torch

    search = generation_options(options, model)
    with naming_options(SETTINGS):
        explanation = explain(
            model,
            question.task,
            options.image,
            question.text,
            options=search,
            saliency=options.saliency,
            name=_public_name(options.model),
        )
    values: dict[str, Any] = explanation.to_dict()
    return values


def _public_name(model: str) -> str:
    """Return the name of a model, and of a local path only the last part: a page must not show where it is."""
    return Path(model).resolve().name if Path(model).exists() else model


def _render(values: Mapping[str, Any]) -> str:
    from florence2.inspect.page.render import render_page

    return render_page(values)


def _load_plots() -> ModuleType:
    """Return the module that plots. Raises OptionError when matplotlib is missing."""
    with require_extra("inspect", "--plots"):
        import florence2.inspect.plots as plots
    return plots


def _write_plots(plots: ModuleType, values: Mapping[str, Any], folder: Path) -> None:
    """Write `lens`, `attention-NNN` of every token, `spread-NNN` of every location token; NNN counts from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"lens": partial(plots.plot_lens, values)}
    for i in range(len(values["tokens"])):
        makers[f"attention-{i:03}"] = partial(plots.plot_attention, values, i)
    for i in plots.location_tokens(values):
        makers[f"spread-{i:03}"] = partial(plots.plot_location_spread, values, i)
    with Progress(len(makers), things="plots") as progress:
        for done, (name, maker) in enumerate(makers.items(), 1):
            figure = maker()
            for ending in plots.FORMATS:
                plots.save_figure(figure, folder / f"{name}.{ending}")
            progress.show(done)
