"""Whether a folder's graphs are those of its settings and of one export, before anything is computed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from florence2.checkpoints.files import hash_file, read_json
from florence2.errors import CheckpointError, shown
from florence2.lite.layout import EXPORT, USE_CACHE, cache_names
from florence2.lite.sessions import Graph, Graphs
from florence2.model.config import Florence2Config, TextConfig

Shape = Sequence[int | None]
"""The sizes of an input or output; None where any size is right."""


def check_hashes(folder: Path) -> None:
    """Raise CheckpointError for a file that is not the one that the export wrote.

    Several graphs read their weights in one file, so that another export's file would give other answers without an
    error. A folder without `export.json`, or with that of an older version, is not checked.
    """
    path = folder / EXPORT
    stated = read_json(path).get("files", {}) if path.exists() else {}
    if not isinstance(stated, dict):
        raise CheckpointError(f"{path} states the files {shown(stated)}, not an object; export the model again.")
    for name, digest in stated.items():
        file = folder / name
        if file.is_file() and hash_file(file) != digest:
            raise CheckpointError(
                f"{file} has changed since the export (its SHA-256 is not that in {EXPORT}); export the model again, "
                f"or delete {EXPORT} if the change is meant."
            )


def check_graphs(graphs: Graphs, config: Florence2Config) -> None:
    """Raise CheckpointError where a graph has other inputs, outputs or sizes than the model of `config`."""
    text, width = config.text, (None, None, config.text.d_model)
    _check(graphs.vision, {"pixel_values": (None, 3, None, None)}, {graphs.vision.outputs[0]: width})
    _check(graphs.embed, {"input_ids": (None, None)}, {graphs.embed.outputs[0]: width})
    masked = {"attention_mask": (None, None), "inputs_embeds": width}
    _check(graphs.encoder, masked, {graphs.encoder.outputs[0]: width})
    logits = {"logits": (None, None, text.vocab_size), **_cache("present", "decoder", text)}
    past = {**_cache("past_key_values", "decoder", text), **_cache("past_key_values", "encoder", text)}
    fed = {"inputs_embeds": width, "encoder_attention_mask": (None, None), **past}
    memory = {"encoder_hidden_states": width}
    projected = _cache("present", "encoder", text)
    if graphs.step is not None and graphs.cross is not None:
        _check(graphs.step, fed, logits)
        _check(graphs.cross, memory, projected)
    if graphs.merged is not None:
        _check(graphs.merged, {**fed, **memory, USE_CACHE: (None,)}, {**logits, **projected})


def _cache(prefix: str, source: str, text: TextConfig) -> dict[str, Shape]:
    """Return the shapes of keys and values by name: (B, heads, length, d)."""
    heads = text.decoder_attention_heads
    return dict.fromkeys(cache_names(prefix, source, text.decoder_layers), (None, heads, None, text.d_model // heads))


def _check(graph: Graph, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> None:
    """Compare the ends of a graph with those of the model; further outputs do no harm."""
    problems = [f"it has no input {name}" for name in inputs if name not in graph.inputs]
    problems += [f"it needs an input {name}" for name in graph.inputs if name not in inputs]
    problems += [f"it has no output {name}" for name in outputs if name not in graph.outputs]
    problems += [
        f"{name} has the shape {_written(graph.shapes[name])}, not {_written(shape)}"
        for name, shape in {**inputs, **outputs}.items()
        if name in graph.shapes and not _fits(graph.shapes[name], shape)
    ]
    if problems:
        raise CheckpointError(
            f"{graph.path} is not the graph that config.json describes: {problems[0]}. Take all files from one export."
        )


def _fits(shape: Shape, expected: Shape) -> bool:
    """Return whether a graph's shape allows the expected one; no sizes at all mean that it is not known."""
    return not shape or (
        len(shape) == len(expected)
        and all(size is None or other is None or size == other for size, other in zip(shape, expected, strict=True))
    )


def _written(shape: Shape) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
