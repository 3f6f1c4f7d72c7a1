"""`florence2 download MODEL`: fetch a checkpoint from the Hugging Face Hub."""

import argparse
from collections.abc import Sequence

from florence2.checkpoints.hub import NAMES, download
from florence2.cli.options.arguments import say
from florence2.cli.options.groups import add_pickle, add_revision
from florence2.cli.options.values import name_argument


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 download",
        description="Fetch a checkpoint from the Hugging Face Hub into its cache, and print the folder.",
    )
    parser.add_argument("model", type=name_argument, metavar="MODEL", help=f"{', '.join(NAMES)}, or OWNER/NAME")
    add_revision(parser)
    add_pickle(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Fetch the checkpoint; return 0."""
    options = build_parser().parse_args(arguments)
    print(download(options.model, revision=options.revision, allow_pickle=options.allow_pickle, report=say))
    return 0
