"""`florence2 init FOLDER`: write an untrained checkpoint, for tests and benchmarks."""

import argparse
from collections.abc import Sequence

from florence2.cli.options.arguments import resolve_model
from florence2.cli.options.groups import DTYPES, MODELS
from florence2.cli.options.values import name_argument, path_argument


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 init", description="Write an untrained checkpoint, for tests and benchmarks."
    )
    parser.add_argument("folder", type=path_argument, metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--preset", choices=("tiny", "base", "large"), default="base", help="size of the model (default: base)"
    )
    parser.add_argument(
        "--tokenizer", type=name_argument, required=True, help=f"checkpoint to copy the tokenizer from: {MODELS}"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="type of the weights (default: float16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Write the checkpoint; return 0."""
    options = build_parser().parse_args(arguments)
    source = resolve_model(options.tokenizer)
    from florence2.checkpoints.checkpoint import checkpoint_folder
    from florence2.checkpoints.checks.loading import DTYPES as TORCH_DTYPES
    from florence2.checkpoints.presets import init_checkpoint, preset

    dtype = TORCH_DTYPES[options.dtype]
    init_checkpoint(options.folder, preset(options.preset), checkpoint_folder(source), options.seed, dtype)
    print(options.folder)
    return 0
