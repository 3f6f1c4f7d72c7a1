"""The options of commands that answer through the journal: how the work is divided, and when it is given up."""

import argparse

from florence2.cli.options.arguments import check_at_least, check_devices
from florence2.cli.options.groups import add_devices
from florence2.label.devices import count_cores
from florence2.label.errors import parse_error_limit

MOST_WORKERS = 8
"""Decode workers where nobody says how many; at 13 ms for a JPEG of a camera they keep a fast GPU busy."""
_SHARD_LETTERS = 40  # of --shard, so that no number is too long for Python


def add_work(parser: argparse.ArgumentParser, shard: str) -> None:
    """Add how the work is divided among runs, devices and workers; `shard` is the help of --shard."""
    parser.add_argument("--shard", type=parse_shard, metavar="I/N", help=shard)
    add_devices(parser, "one process for each device, such as cuda:0,cuda:1; each does a shard of its own")
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


def check_work(options: argparse.Namespace) -> None:
    """Raise OptionError for options of `add_work` that do not fit; choose the number of workers if it is not given."""
    check_at_least(options, 0, "workers")
    check_devices(options)
    if options.workers is None:
        options.workers = max(1, min(count_cores() - 1, MOST_WORKERS))


def parse_shard(text: str) -> tuple[int, int]:
    """Return (I, N) for "I/N". Raises ArgumentTypeError for anything else."""
    first, slash, last = text.partition("/")
    digits = slash and first.isdecimal() and last.isdecimal() and len(text) < _SHARD_LETTERS
    if not (digits and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(
            f"{text[:_SHARD_LETTERS]!r} is not a part; give I/N with I from 1 to N, such as 3/16"
        )
    return int(first), int(last)
