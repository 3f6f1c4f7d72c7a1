"""`florence2 audit A [B]`: measure a checkpoint's tensors, or compare two checkpoints."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from florence2.cli.main import parse_words
from florence2.cli.options.arguments import check_at_least, resolve_model
from florence2.cli.options.groups import MODELS, add_pickle, add_report
from florence2.cli.options.values import name_argument
from florence2.cli.progress import Progress
from florence2.errors import OptionError
from florence2.inspect.out_file import check_out, write_out

if TYPE_CHECKING:
    from pathlib import Path

    from florence2.inspect.audit.checkpoint import Audit
    from florence2.inspect.audit.difference import Difference, ProgressOf

Report = TypeVar("Report", "Audit", "Difference")


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 audit",
        description="Measure every tensor of a checkpoint, or show where and by how much two checkpoints differ.",
    )
    parser.add_argument("checkpoint", type=name_argument, metavar="A", help=MODELS)
    parser.add_argument(
        "other", nargs="?", type=name_argument, metavar="B", help="a second checkpoint, to compare with the first"
    )
    parser.add_argument("--revision", help="branch, tag or commit of A on the Hub (default: its main branch)")
    parser.add_argument("--revision-b", metavar="REVISION", help="branch, tag or commit of B on the Hub")
    parser.add_argument(
        "--spectra",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute singular values: of a checkpoint's matrices, or of the change between two; this takes most of "
        "the time (default: on)",
    )
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="how many findings and tensors to list (default: 10)"
    )
    add_report(parser)
    parser.add_argument("--strict", action="store_true", help="exit code 1 if loading would refuse a checkpoint")
    add_pickle(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the audit of one checkpoint or the comparison of two, or write it to `--out`; progress goes to stderr.

    Returns:
        0, or 1 with `--strict` when a checkpoint has a problem for which loading would refuse it.

    Raises:
        Florence2Error: A checkpoint cannot be read at all.
    """
    options = parse_words(build_parser(), arguments)
    _check(options)
    first = resolve_model(options.checkpoint, options.revision, options.allow_pickle)
    if options.other is None:
        problems = _audit(options, first)
    else:
        second = resolve_model(options.other, options.revision_b, options.allow_pickle)
        problems = _compare(options, first, second)
    return int(options.strict and problems)


def _check(options: argparse.Namespace) -> None:
    check_at_least(options, 0, "top")
    if options.revision_b is not None and options.other is None:
        raise OptionError("--revision-b belongs to a second checkpoint, but only one is given; use --revision.")
    if options.out is not None:
        check_out(options.out, options.overwrite)


def _audit(options: argparse.Namespace, path: "Path") -> bool:
    """Write the audit of one checkpoint; return whether it has problems."""
    from florence2.inspect.audit.checkpoint import audit
    from florence2.inspect.audit.text import format_audit

    with _show_progress() as progress_of:
        progress = progress_of(f"tensors of {path}")
        report = audit(path, spectra=options.spectra, allow_pickle=options.allow_pickle, progress=progress)
    _write(options, report, format_audit)
    return bool(report.problems)


def _compare(options: argparse.Namespace, first: "Path", second: "Path") -> bool:
    """Write the comparison of two checkpoints; return whether either has problems."""
    from florence2.inspect.audit.difference import compare_checkpoints
    from florence2.inspect.audit.text import format_difference

    with _show_progress() as progress_of:
        report = compare_checkpoints(
            first, second, spectra=options.spectra, allow_pickle=options.allow_pickle, progress=progress_of
        )
    _write(options, report, format_difference)
    return bool(report.a.problems or report.b.problems)


def _write(options: argparse.Namespace, report: Report, as_text: Callable[[Report, int], str]) -> None:
    """Write JSON or a page to `--out`, or JSON or text to stdout."""
    from florence2.inspect.audit.page import render_audit

    values = json.dumps(report.to_dict(), allow_nan=False) if options.json else None
    if options.out is not None:
        write_out(options.out, values or render_audit(report, options.top))
        print(options.out)
    else:
        print(values or as_text(report, options.top))


@contextmanager
def _show_progress() -> Iterator["ProgressOf"]:
    """Yield a function that starts the progress line of a piece of work and ends the line before it."""
    lines: list[Progress] = []

    def close() -> None:
        if lines:
            lines.pop().close()

    def progress_of(things: str) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if not done:
                close()
                lines.append(Progress(total, things=things))
            lines[-1].show(done)

        return progress

    try:
        yield progress_of
    finally:
        close()
