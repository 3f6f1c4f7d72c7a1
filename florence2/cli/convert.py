"""`florence2 convert SOURCE FOLDER`: rewrite a checkpoint in another layout or type, or without pickles."""

import argparse
from collections.abc import Sequence

from florence2.checkpoints.hub import resolve_adapter
from florence2.cli.options.arguments import model_changes, resolve_model
from florence2.cli.options.groups import DTYPES, MODELS, add_adapter, add_changes, add_pickle, add_task_kind
from florence2.cli.options.values import name_argument, path_argument


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 convert",
        description="Rewrite a checkpoint as safetensors: in another layout, in another type, or with an adapter "
        "merged into it.",
    )
    parser.add_argument("source", type=name_argument, metavar="SOURCE", help=MODELS)
    parser.add_argument("folder", type=path_argument, metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--layout",
        choices=("microsoft", "native"),
        default="microsoft",
        help="names of tensors and settings: Microsoft's or those of transformers (default: microsoft)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as stored)")
    add_adapter(parser)
    add_task_kind(parser)
    add_changes(parser)
    add_pickle(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Convert the checkpoint; return 0."""
    options = build_parser().parse_args(arguments)
    source = resolve_model(options.source, allow_pickle=options.allow_pickle)
    adapter = resolve_adapter(options.adapter) if options.adapter else None
    from florence2.checkpoints.checkpoint import convert_checkpoint
    from florence2.checkpoints.checks.loading import DTYPES as TORCH_DTYPES

    dtype = TORCH_DTYPES[options.dtype] if options.dtype else None
    changes = model_changes(options)
    convert_checkpoint(
        source,
        options.folder,
        options.layout,
        dtype,
        options.allow_pickle,
        adapter,
        **changes,
        tasks=options.task_kind,
    )
    print(options.folder)
    return 0
