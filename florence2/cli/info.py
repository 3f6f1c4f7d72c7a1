"""`florence2 info CHECKPOINT`: describe a checkpoint without loading it."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from florence2.cli.options.arguments import resolve_model
from florence2.cli.options.groups import MODELS, add_pickle
from florence2.cli.options.values import name_argument


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 info",
        description="Describe a checkpoint: its layout, types, sizes, parameters, settings and hashes.",
    )
    parser.add_argument("checkpoint", type=name_argument, metavar="CHECKPOINT", help=MODELS)
    parser.add_argument("--json", action="store_true", help="JSON instead of text on stdout")
    add_pickle(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the description; return 0."""
    options = build_parser().parse_args(arguments)
    path = resolve_model(options.checkpoint, allow_pickle=options.allow_pickle)
    from florence2.checkpoints.describe import describe_checkpoint

    described = describe_checkpoint(path, options.allow_pickle)
    if options.json:
        print(json.dumps(described))
    else:
        _print_text(described)
    return 0


def _print_text(described: Mapping[str, Any]) -> None:
    for key, value in described.items():
        if key == "files":
            for file in value:
                print(f"{file['name']}: {file['bytes']:,} bytes, sha256 {file['sha256']}")
        elif isinstance(value, dict):
            print(f"{key}:")
            for name, part in value.items():
                print(f"  {name}: {_as_text(part)}")
        else:
            print(f"{key}: {value}")


def _as_text(value: Any) -> str:
    """Return a number with thousands separators, a text unchanged, and anything else as JSON."""
    if type(value) is int:
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
