"""From a loaded model to a folder of graphs."""

import copy
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import onnxruntime
import torch
from torch import nn

from florence2 import __version__
from florence2.checkpoints.checks.comparison import require_described
from florence2.checkpoints.files import hash_file, write_json
from florence2.errors import CheckpointError, OptionError, shown
from florence2.export.agreement import compare_answers, prove_answers
from florence2.export.folder import new_folder, refuse_full
from florence2.export.graphs.merge import merge_decoders
from florence2.export.graphs.parts import TracedPart, model_parts, trace_part
from florence2.export.graphs.pixels import preprocessing_graph
from florence2.export.graphs.storage import halve, quantise, share_weights
from florence2.export.prove import prove_graphs
from florence2.export.sidecars import refuse_untied_answers, write_sidecars
from florence2.lite.layout import (
    CROSS,
    EMBED,
    ENCODER,
    EXPORT,
    FIRST,
    FOLDER,
    MERGED,
    PREPROCESS,
    STEP,
    VISION,
    graph_file,
)
from florence2.model.absent import require_complete
from florence2.model.florence2 import Florence2Model
from florence2.pipeline import Florence2

Weights = Literal["float16", "float32", "int8"]
_INT8_IMAGES = 4  # on which its agreement is measured


def export_onnx(
    model: Florence2,
    folder: Path,
    weights: Weights = "float16",
    *,
    unmerged: bool = False,
    source: Mapping[str, Any] | None = None,
    licence: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a model as ONNX graphs, with the settings next to them, and prove that they compute the same.

    Args:
        model: What `florence2.load(name, device="cpu", attention="eager")` returns.
        folder: Where to write; it must be missing or empty, and appears when everything is written and proved.
        weights: How weights are stored: "float16", which loses nothing for the published checkpoints, "float32", or
            "int8" for the vision tower, where the time goes, and float16 for the rest. All compute in float32.
        unmerged: Also write the decoder of the first ids as a graph of its own, for runtimes that do not take the
            merged one.
        source: What `export.json` says about the model's files.
        licence: The file of the weights' licence, which is copied if it exists.
        report: Called with a line about each stage.

    Returns:
        The values of `export.json`.

    Raises:
        OptionError: `weights` is unknown, or the model is not a plain one in float32 on the CPU.
        CheckpointError: The model has a part for which the layout has no place, or values that float16 cannot hold.
        ProofError: A graph does not compute what the model does; nothing is written.
        OutputError: The folder holds something, or cannot be written.
    """
    if weights not in get_args(Weights):
        raise OptionError(f"weights is {shown(weights)}; it must be one of {', '.join(get_args(Weights))}.")
    refuse_full(folder)
    _refuse_others(model.model)
    stored, rounded = (model.model, 0) if weights == "float32" else round_to_float16(model.model)
    if rounded:
        report(f"{rounded:,} values are rounded to float16; --weights float32 keeps them.")
    size = model.processor.image_config.height, model.processor.image_config.width
    # torch imports its exporter now: Ctrl-C during an import ends a process at once, without cleaning up
    trace_part(TracedPart(nn.Identity(), {"x": torch.zeros(1)}, {"x": {}, "y": {}}))
    with new_folder(folder) as draft:
        write_sidecars(draft, model.model.config, model.processor)
        if licence is not None and licence.is_file():
            shutil.copyfile(licence, draft / licence.name)
        _write_graphs(draft, stored, size, weights, unmerged, report)
        _write_preprocessing(draft, model, report)
        report("comparing every graph with the model")
        differences = prove_graphs(draft, stored, *size, exact=weights != "int8")
        report("comparing answers")
        if weights == "int8":
            agreement = compare_answers(draft, model, _INT8_IMAGES)
            report(f"With 8 bits in the vision tower, {agreement} as the model's, about synthetic images.")
        else:
            agreement = prove_answers(draft, model, rounded > 0)
        values = {
            "format": "onnx",
            "source": dict(source or {}),
            "weights": {"storage": weights, "rounded_values": rounded},
            "files": {graph: hash_file(draft / graph) for graph in _graph_files(draft)},
            "versions": versions(),
            "differences": differences,
            "answers": {"compared": agreement.answers, "same_tokens": agreement.same},
        }
        write_json(draft / EXPORT, values)
    return values


def round_to_float16(model: Florence2Model) -> tuple[Florence2Model, int]:
    """Return a model whose parameters float16 holds exactly, and how many values had to be rounded.

    Raises CheckpointError for a value that float16 cannot hold at all.
    """
    count = 0
    for name, parameter in model.named_parameters():
        half = parameter.detach().half().float()
        if not half.isfinite().all():
            raise CheckpointError(f"{name} has values that float16 cannot hold; export with --weights float32.")
        count += int((half != parameter).sum())
    if count == 0:
        return model, 0
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.half())
    return rounded, count


def _graph_files(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in sorted((folder / FOLDER).iterdir())]


def versions() -> dict[str, str]:
    """Return the versions of what made an export."""
    return {
        "florence2": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def _refuse_others(model: Florence2Model) -> None:
    """Raise OptionError or CheckpointError for a model that cannot be traced, or not be stored."""
    require_complete(model)
    refuse_untied_answers(model.config)
    require_described(model)
    plain = all(getattr(module, "attention", "eager") == "eager" for module in model.modules())
    if not plain or model.device.type != "cpu" or model.dtype != torch.float32:
        raise OptionError(
            'The export needs a plain model in float32 on the CPU: load(..., device="cpu", dtype="float32", '
            'attention="eager").'
        )


def _write_graphs(
    folder: Path,
    model: Florence2Model,
    size: tuple[int, int],
    weights: Weights,
    unmerged: bool,
    report: Callable[[str], None],
) -> None:
    """Trace the parts one after another and write them; at most two are in memory."""
    (folder / FOLDER).mkdir()
    parts = model_parts(model, *size)

    def trace(name: str) -> onnx.ModelProto:
        report(f"tracing {name}")
        return trace_part(parts[name])

    def write(name: str, graph: onnx.ModelProto) -> Path:
        file = folder / graph_file(name)
        if weights != "float32":
            halve(graph)
        file.write_bytes(graph.SerializeToString())
        return file

    vision = trace(VISION)
    write(VISION, quantise(vision) if weights == "int8" else vision)
    del vision
    for name in (EMBED, ENCODER):
        write(name, trace(name))
    cross = trace(CROSS)
    holder = write(MERGED, merge_decoders(trace(MERGED), cross))
    for name in (CROSS, STEP, *([FIRST] if unmerged else [])):
        graph = cross if name == CROSS else trace(name)
        if weights != "float32":
            halve(graph)
        share_weights(graph, holder)
        (folder / graph_file(name)).write_bytes(graph.SerializeToString())


def _write_preprocessing(folder: Path, model: Florence2, report: Callable[[str], None]) -> None:
    graph = preprocessing_graph(model.processor.image_config)
    if graph is None:
        report(f"{graph_file(PREPROCESS)} is left out: ONNX lacks this checkpoint's filter for resizing.")
    else:
        (folder / graph_file(PREPROCESS)).write_bytes(graph.SerializeToString())
