"""The graphs of an exported folder in onnxruntime, which is imported here alone."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from florence2.errors import CheckpointError, OptionError, clip, plain, shown
from florence2.lite.layout import CROSS, EMBED, ENCODER, MERGED, ONE_SCALE, STEP, VISION, graph_file
from florence2.lite.search.arrays import Array

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
MAX_THREADS = 256
_CPU, _ENDING = "CPUExecutionProvider", "ExecutionProvider"


class Graph:
    """One graph, ready to run. Nothing in it changes, so threads share it.

    Attributes:
        inputs: The names of its inputs, with their types.
        outputs: The names of its outputs.
        shapes: The sizes of both, by name; None where a size is free.
    """

    def __init__(self, path: Path, provider: str, threads: int | None, returns_memory: bool = False):
        """Read a graph; with `returns_memory` it keeps none of what a run took, which costs time.

        Raises CheckpointError when the file is missing or damaged.
        """
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing; give a folder that `florence2 export` has written, or ONNX files of the same "
                "layout."
            )
        self.path = path
        self._session = _open(path, provider, threads)
        self._run_options = _runtime().RunOptions()
        if returns_memory and provider == _CPU:
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.inputs = {each.name: _TYPES.get(each.type, np.float32) for each in inputs}
        self.outputs = [each.name for each in outputs]
        self.shapes = {
            each.name: tuple(size if isinstance(size, int) else None for size in each.shape)
            for each in (*inputs, *outputs)
        }

    def __call__(self, outputs: Sequence[str] | None = None, **feeds: Array) -> list[Array]:
        """Return the `outputs` by name, None for all; as float32 those that are not whole numbers."""
        return self.run(feeds, outputs)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        """Do the same with inputs whose names are not identifiers."""
        typed: dict[str, Array] = {name: value.astype(self.inputs[name], copy=False) for name, value in feeds.items()}
        try:
            values: list[Array] = self._session.run(outputs, typed, self._run_options)
        except Exception as error:  # noqa: BLE001  onnxruntime's have no class in common
            raise CheckpointError(f"{self.path.name} could not be run: {clip(error)}") from None
        return [each.astype(np.float32) if each.dtype == np.float16 else each for each in values]


@dataclass(frozen=True)
class Graphs:
    """The graphs of one model. Of the decoder there is either `step` and `cross`, or `merged`.

    With `one_scale` the rows of a batch depend on each other (see `layout.ONE_SCALE`).
    """

    vision: Graph
    embed: Graph
    encoder: Graph
    step: Graph | None = None
    cross: Graph | None = None
    merged: Graph | None = None
    one_scale: bool = False


def open_graphs(folder: Path, kind: str = "float32", provider: str = "cpu", threads: int | None = None) -> Graphs:
    """Open the graphs of a folder.

    The decoder's step and the graph of the memory's keys and values take the place of the merged decoder where the
    folder has them: onnxruntime would hold the weights of the latter once for each of its branches.

    Args:
        folder: What `florence2 export` has written, or a published folder of the same layout.
        kind: The type in which the graphs compute, a key of `layout.SUFFIXES`.
        provider: "cpu", or another of onnxruntime's, such as "cuda".
        threads: How many threads an operation may use; None is onnxruntime's own choice.

    Raises:
        CheckpointError: A file is missing or damaged.
        OptionError: `provider` or `threads` is wrong, or onnxruntime is not installed.
    """
    name, threads = find_provider(provider), check_threads(threads)

    def has(graph: str) -> bool:
        return (folder / graph_file(graph, kind)).is_file()

    apart = has(STEP) and has(CROSS)
    names = (VISION, EMBED, ENCODER, *((STEP, CROSS) if apart else (MERGED,)))
    vision, embed, encoder, *decoder = (
        # once for each image, and more than all others together
        Graph(folder / graph_file(each, kind), name, threads, returns_memory=each == VISION)
        for each in names
    )
    one_scale = kind in ONE_SCALE
    if apart:
        return Graphs(vision, embed, encoder, step=decoder[0], cross=decoder[1], one_scale=one_scale)
    return Graphs(vision, embed, encoder, merged=decoder[0], one_scale=one_scale)


def find_provider(provider: str) -> str:
    """Return onnxruntime's name of a provider. Raises OptionError for one that it does not have."""
    available: list[str] = _runtime().get_available_providers()
    names = {name.removesuffix(_ENDING).lower(): name for name in available}
    chosen = str(provider).lower().removesuffix(_ENDING.lower())
    if chosen not in names:
        raise OptionError(
            f"provider is {shown(provider)}, but onnxruntime has only {', '.join(sorted(names))} here; its other "
            "packages, such as onnxruntime-gpu for CUDA, have more."
        )
    return names[chosen]


def check_threads(threads: int | None) -> int | None:
    """Return how many threads an operation may use. Raises OptionError for a wrong number."""
    threads = plain(threads)
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise OptionError(f"threads is {shown(threads)}; it must be a whole number from 1 to {MAX_THREADS}.")
    return threads


def versions() -> dict[str, str]:
    """Return the version of onnxruntime, by its name."""
    return {"onnxruntime": _runtime().__version__}


def _open(path: Path, provider: str, threads: int | None) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # below fatal ones nothing is printed: errors are raised as well
    # a plan of a run's memory is a block of its own: 300 MB for an image of 768 x 768 in base, and no faster
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(os.fspath(path), options, [*dict.fromkeys([provider, _CPU])])
    except Exception as error:  # noqa: BLE001  onnxruntime's have no class in common
        raise CheckpointError(f"onnxruntime cannot read {path}: {clip(error)}") from None
    if session.get_providers()[0] != provider:  # onnxruntime falls back to the CPU without a word
        raise OptionError(f"onnxruntime could not start {provider}; its libraries are missing. Choose provider cpu.")
    return session


def _runtime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise OptionError(
            "florence2.lite needs the package onnxruntime, which is not installed: pip install onnxruntime"
        ) from None
    return onnxruntime
