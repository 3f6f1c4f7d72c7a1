"""`florence2 export MODEL FOLDER`: write a model for other runtimes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from florence2.checkpoints.files import checkpoint_folder, hash_file
from florence2.checkpoints.hub import resolve_adapter
from florence2.cli.options.arguments import resolve_model, say
from florence2.cli.options.groups import MODELS, add_adapter, add_pickle, add_revision, add_task_kind
from florence2.cli.options.values import name_argument, path_argument


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 export",
        description="Write a model as ONNX graphs, in the layout of transformers.js and florence2.lite, and compare "
        "every graph with the model. The folder appears when all of them agree.",
    )
    parser.add_argument("model", type=name_argument, metavar="MODEL", help=MODELS)
    parser.add_argument("folder", type=path_argument, metavar="FOLDER", help="output folder; new or empty")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="what to write (default: onnx)")
    parser.add_argument(
        "--weights",
        choices=("float16", "float32", "int8"),
        default="float16",
        help="how weights are stored; graphs compute in float32. float16 loses nothing for the published checkpoints; "
        "int8 is for the vision tower alone, faster, and changes some answers (default: float16)",
    )
    parser.add_argument(
        "--unmerged",
        action="store_true",
        help="also write the decoder of the first tokens as a graph of its own, for runtimes that lack ONNX's If",
    )
    add_adapter(parser)
    add_revision(parser)
    add_task_kind(parser)
    add_pickle(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Export the model; print the folder and return 0."""
    options = build_parser().parse_args(arguments)
    import onnx  # noqa: F401  missing packages are reported before a model is fetched
    import onnxruntime  # noqa: F401

    from florence2.export.folder import refuse_full

    refuse_full(options.folder)
    path = resolve_model(options.model, options.revision, options.allow_pickle)
    adapter = resolve_adapter(options.adapter) if options.adapter else None
    from florence2.export.exporting import export_onnx
    from florence2.loading import load
    from florence2.modify import add_tasks

    model = load(
        path, device="cpu", dtype="float32", attention="eager", allow_pickle=options.allow_pickle, adapter=adapter
    )
    export_onnx(
        add_tasks(model, model.processor.tasks.declared(options.task_kind).own),
        options.folder,
        options.weights,
        unmerged=options.unmerged,
        source=describe_source(options.model, path, adapter, options.allow_pickle),
        licence=checkpoint_folder(path) / "LICENSE",
        report=say,
    )
    print(options.folder)
    return 0


def describe_source(name: str, path: Path, adapter: Path | None, allow_pickle: bool) -> dict[str, Any]:
    """Return the name and the hashes of the files that a model was read from; of local paths only the last part."""
    from florence2.checkpoints.files import find_weight_files

    files, _ = find_weight_files(path, allow_pickle)
    config = checkpoint_folder(path) / "config.json"
    values: dict[str, Any] = {"name": Path(name).resolve().name if Path(name).exists() else name}
    values["sha256"] = {file.name: hash_file(file) for file in (config, *files)}
    if adapter is not None:
        values["adapter_sha256"] = {file.name: hash_file(file) for file in sorted(adapter.glob("adapter_*"))}
    return values
