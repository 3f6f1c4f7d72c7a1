"""`florence2 inspect PICTURE TASK`: one answer with all that led to it, as a page, as JSON, as plots."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from florence2.bulk.sinks import Progress
from florence2.checkpoints.hub import DEFAULT_MODEL, NAMES
from florence2.cli.extras import load_extra
from florence2.errors import OptionError, PromptError
from florence2.inputs.coordinates import bins_to_tokens
from florence2.inputs.image import open_image
from florence2.inputs.tasks import check_prompt, find_task
from florence2.inspect.out_file import check_out, write_out
from florence2.inspect.page.render import render_page
from florence2.pipeline import load


def main(arguments: Sequence[str]) -> int:
    """Answer one task on one picture and write why: the page of `--out`, `--json` in its place, `--plots` beside it.

    A file that exists is left alone unless `--overwrite` is given. Prints what was written, or the JSON itself when
    it has no file to go to. Returns 0. Raises a Florence2Error for unusable input, before a model is loaded if it can.
    """
    chosen = build_parser().parse_args(arguments)
    _check(chosen)
    plots = load_extra("florence2.inspect.plots", "inspect", "--plots") if chosen.plots else None
    values = _explain(chosen)
    if chosen.json and chosen.out is None:
        print(json.dumps(values, allow_nan=False))
    elif chosen.out is not None:
        text = json.dumps(values, allow_nan=False) if chosen.json else render_page(values)
        write_out(chosen.out, text)
        print(chosen.out)
    if plots is not None:
        _write_plots(plots, values, chosen.plots)
        print(chosen.plots, file=sys.stderr if chosen.json and chosen.out is None else sys.stdout)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 inspect",
        description="Answer one task on one picture and show why: where each token looked, what each layer thought, "
        'what else it might have said, how the search went. Example: florence2 inspect photo.jpg "<CAPTION>" --out '
        "report.html",
    )
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="a file")
    parser.add_argument("task", metavar="TASK", help="a task's token or name, or a free prompt")
    parser.add_argument("--text", help="the task's input")
    parser.add_argument(
        "--box", metavar="X1,Y1,X2,Y2", type=_box, help="the task's region, in pixels (--box=-5,... if negative)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page to write, one self-contained HTML file")
    parser.add_argument(
        "--json", action="store_true", help="the explanation as JSON, in place of the page or on stdout"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also write plots of every token, as PNG and SVG")
    parser.add_argument("--overwrite", action="store_true", help="write --out even if there is such a file")
    parser.add_argument(
        "--saliency",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="what each token hangs on: a pass back through the whole model for each (most of the time goes there)",
    )
    known = ", ".join(NAMES)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"{known}, OWNER/NAME, a folder or a file ({DEFAULT_MODEL})"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    parser.add_argument("--beams", type=int, help="beams of the search, 1 for greedy (the model's own setting)")
    parser.add_argument("--max-new-tokens", type=int, help="limit of the answer's length (the model's own setting)")
    return parser


def _check(chosen: argparse.Namespace) -> None:
    """Refuse what cannot work before the slow part begins."""
    if chosen.out is None and chosen.plots is None and not chosen.json:
        raise OptionError("Where to? Give --out report.html, --plots DIR or --json.")
    if chosen.out is not None:
        check_out(chosen.out, chosen.overwrite)
    if chosen.plots is not None and chosen.plots.exists() and not chosen.plots.is_dir():
        raise OptionError(f"{chosen.plots} is a file; --plots needs a folder.")
    _check_question(chosen.task, chosen.text, chosen.box)
    open_image(chosen.picture)


def _check_question(task: str, text: str | None, box: tuple[float, ...] | None) -> None:
    if text is not None and box is not None:
        raise PromptError(f"{task} takes one input; give --text or --box, not both.")
    found = find_task(task)
    if box is None:
        check_prompt(task, text)
    elif found is None or found.takes != "region":
        raise PromptError(f"{task} takes no region; leave out --box.")
    else:
        check_prompt(task, bins_to_tokens([0] * 4))  # stands for the box until the picture's size is known


def _box(text: str) -> tuple[float, ...]:
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be four numbers X1,Y1,X2,Y2 in pixels") from None
    return (x1, y1, x2, y2)


def _explain(chosen: argparse.Namespace) -> dict[str, Any]:
    module = load_extra("florence2.inspect.explanation", "inspect", "`florence2 inspect`")
    model = load(
        chosen.model, device=chosen.device, revision=chosen.revision, report=lambda line: print(line, file=sys.stderr)
    )
    changes = {"num_beams": chosen.beams, "max_new_tokens": chosen.max_new_tokens}
    options = model.options(**{name: value for name, value in changes.items() if value is not None})
    found = module.explain(
        model,
        chosen.task,
        chosen.picture,
        text=chosen.text,
        box=chosen.box,
        options=options,
        saliency=chosen.saliency,
        name=_name(chosen.model),
    )
    values: dict[str, Any] = found.to_dict()
    return values


def _name(model: str) -> str:
    """What a page calls the model: of a local one the last part, for where it lies is nobody's business."""
    return Path(model).resolve().name if Path(model).exists() else model


def _write_plots(plots: Any, values: Mapping[str, Any], folder: Path) -> None:
    """`lens`, `attention-NNN` of every token, `spread-NNN` of every location token; NNN counts from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"lens": partial(plots.plot_lens, values)}
    for number in range(len(values["tokens"])):
        makers[f"attention-{number:03}"] = partial(plots.plot_attention, values, number)
    for number in plots.location_tokens(values):
        makers[f"spread-{number:03}"] = partial(plots.plot_location_spread, values, number)
    progress = Progress(len(makers), things="plots")
    for done, (name, maker) in enumerate(makers.items(), 1):
        figure = maker()
        for ending in plots.FORMATS:
            plots.save_figure(figure, folder / f"{name}.{ending}")
        progress.show(done)
    progress.close()
