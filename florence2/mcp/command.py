"""`florence2 mcp`: offer a model to an assistant over stdin and stdout."""

import argparse
from collections.abc import Sequence

from florence2.cli.options.arguments import load_model, say
from florence2.cli.options.groups import add_calibration, add_model, add_weights
from florence2.cli.options.values import path_argument


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 mcp",
        description="Offer three tools to an assistant over the Model Context Protocol, on stdin and stdout: describe "
        "an image, find things in it, read its text. The assistant's program starts this command.",
    )
    parser.add_argument(
        "--root",
        action="append",
        required=True,
        type=path_argument,
        metavar="DIR",
        help="a folder below which images may be read, and no file outside of it; repeatable",
    )
    add_model(parser)
    add_weights(parser)
    add_calibration(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Answer calls until stdin ends; return 0.

    Raises:
        Florence2Error: A root is not a folder, or the model cannot be loaded.
    """
    options = build_parser().parse_args(arguments)
    import mcp  # noqa: F401  a missing package is reported before the model is loaded

    from florence2.mcp.roots import check_roots

    roots = check_roots(options.root)
    model = load_model(options)
    from florence2.mcp.tools import make_server

    say(f"florence2: ready; images below {', '.join(map(str, roots))} may be read.")
    make_server(model, roots).run("stdio")
    return 0
