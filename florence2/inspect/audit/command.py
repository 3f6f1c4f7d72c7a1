"""`florence2 audit A [B]`: what a checkpoint's tensors are like, or what differs between two checkpoints."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from florence2.bulk.sinks import Progress
from florence2.checkpoints.hub import NAMES, resolve
from florence2.errors import OptionError
from florence2.inspect.audit.checkpoint import Audit, audit
from florence2.inspect.audit.difference import Difference, ProgressOf, compare_checkpoints
from florence2.inspect.audit.page import render_audit
from florence2.inspect.audit.text import format_audit, format_difference
from florence2.inspect.out_file import check_out, write_out

Found = TypeVar("Found", Audit, Difference)


def main(arguments: Sequence[str]) -> int:
    """Print the audit of one checkpoint or the comparison of two, or write it to `--out`; progress goes to stderr.

    Returns 0, or 1 with `--strict` when a checkpoint has a problem for which loading would refuse it.
    Raises a Florence2Error for what is no checkpoint at all.
    """
    chosen = build_parser().parse_args(arguments)
    if chosen.top < 0:
        raise OptionError(f"--top is {chosen.top}; it must be 0 or more.")
    if chosen.revision_b is not None and chosen.other is None:
        raise OptionError("--revision-b is of the second checkpoint, and there is only one; use --revision.")
    if chosen.out is not None:
        check_out(chosen.out, chosen.overwrite)
    first = resolve(chosen.checkpoint, chosen.revision, allow_pickle=chosen.allow_pickle, report=_report)
    if chosen.other is None:
        with _telling() as told:
            one = audit(
                first, spectra=chosen.spectra, allow_pickle=chosen.allow_pickle, progress=told(f"tensors of {first}")
            )
        _tell(chosen, one, format_audit)
        return int(chosen.strict and bool(one.problems))
    second = resolve(chosen.other, chosen.revision_b, allow_pickle=chosen.allow_pickle, report=_report)
    with _telling() as told:
        two = compare_checkpoints(
            first, second, spectra=chosen.spectra, allow_pickle=chosen.allow_pickle, progress=told
        )
    _tell(chosen, two, format_difference)
    return int(chosen.strict and bool(two.a.problems or two.b.problems))


def _tell(chosen: argparse.Namespace, found: Found, as_text: Callable[[Found, int], str]) -> None:
    """JSON or a page to `--out`, JSON or text to stdout."""
    if chosen.out is not None:
        write_out(chosen.out, _json(found.to_dict()) if chosen.json else render_audit(found, chosen.top))
        print(chosen.out)
    else:
        print(_json(found.to_dict()) if chosen.json else as_text(found, chosen.top))


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 audit",
        description="Measure every tensor of a checkpoint, or say what differs between two and by how much.",
    )
    known = ", ".join(NAMES)
    parser.add_argument("checkpoint", metavar="A", help=f"{known}, OWNER/NAME, a folder or a weight file")
    parser.add_argument("other", nargs="?", metavar="B", help="a second one, to compare with the first")
    parser.add_argument("--revision", help="branch, tag or commit of A on the Hub")
    parser.add_argument("--revision-b", metavar="REVISION", help="the same for B")
    parser.add_argument(
        "--spectra",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="singular values: of one checkpoint's maps; of two, of what changed (most of the time goes there)",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many findings and tensors to list (10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a page, one self-contained HTML file")
    parser.add_argument(
        "--json", action="store_true", help="one JSON document with every tensor, in place of the page or on stdout"
    )
    parser.add_argument("--overwrite", action="store_true", help="write --out even if there is such a file")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if loading would refuse a checkpoint")
    parser.add_argument("--allow-pickle", action="store_true", help="read a .bin where there are no safetensors")
    return parser


@contextmanager
def _telling() -> Iterator[ProgressOf]:
    """Progress of one piece of work after another, on stderr; a piece that begins ends the one before."""
    shown: list[Progress] = []

    def told(things: str) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            if not done:
                _close(shown)
                shown.append(Progress(total, things=things))
            shown[-1].show(done)

        return tell

    try:
        yield told
    finally:
        _close(shown)


def _close(shown: list[Progress]) -> None:
    if shown:
        shown.pop().close()


def _json(values: object) -> str:
    return json.dumps(values, allow_nan=False)
