"""Stored tensors against the model that they fill: every one that is unexpected, misshapen or missing is listed."""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from florence2.checkpoints.describe import weights_layout
from florence2.checkpoints.layouts import (
    ENCODER_EMBEDDING,
    MAY_DIFFER,
    OPTIONAL,
    SHARED,
    TRANSPOSED,
    canonical_name,
    held_name,
    stored_name,
)
from florence2.checkpoints.tensors import TensorInfo, WeightFiles, equals, is_finite
from florence2.errors import MAX_LISTED, CheckpointError, listing
from florence2.model.config import Layout

NEEDS_PREPARE = "the model was saved with the prepare function {0}; load it with that: prepare=, or --prepare {0}"
_ADDED = "If modules were added to the model before it was saved, load it with the function that adds them as prepare=."
_NOT_HELD = (
    "The prepare function says which tensors the file must hold; f.save(folder, prepare=...) writes a checkpoint of a "
    "model that it describes."
)


def read_weights(
    files: WeightFiles,
    headers: Mapping[str, TensorInfo],
    expected: Mapping[str, TensorInfo],
    wanted: Collection[str],
    device: torch.device | str,
    dtype: torch.dtype,
    prepared: bool = False,
    known_problems: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Read the `wanted` tensors by canonical name. Raises CheckpointError listing all problems, `known_problems` first.

    A use of the token embedding that has other values than it (see `MAY_DIFFER`) is returned in addition.

    `headers` are those of `files`. `expected` describes every tensor of the model, which a function of the user's may
    have `prepared`; the values of those that are not wanted are not read. Floating-point values become `dtype`.
    """
    layout = weights_layout(files, headers)
    targets = {name: canonical_name(name, layout) for name in headers}
    problems = [*known_problems, *compare_tensors(headers, targets, expected, wanted, layout)]
    hint = _hint(problems, prepared)
    weights: dict[str, Tensor] = {}
    names = _names_to_read(targets, expected, wanted, layout)
    copies = names & _copies(targets, expected)
    # the token embedding first, so that those of its copies that may differ can be compared with it
    later = {name for name in copies if targets[name] in MAY_DIFFER[layout]}
    for name, stored in chain(files.read(names - later), files.read(later) if later else ()):
        canonical = held_name(targets[name], expected)
        assert canonical is not None
        if _misfit(name, headers[name], targets[name], expected[canonical], layout):
            continue  # reported already; a tensor of an unforeseen size is not worth converting
        if canonical in weights:
            if equals(weights[canonical], stored):
                continue
            if name not in later or later == copies:
                problems.append(f"the token embedding is stored under several names, but {name} has other values")
                continue
            canonical = targets[name]
            assert canonical is not None
        tensor = stored.T if canonical in TRANSPOSED[layout] else stored
        kind = dtype if stored.is_floating_point() else expected[canonical].dtype
        # a copy, because `stored` is valid only until the next tensor is read
        tensor = tensor.to(device, kind, copy=True, memory_format=torch.contiguous_format)
        if not is_finite(tensor):
            problems.append(f"{name} holds values that are not finite (as {dtype})")
        weights[canonical] = tensor
    if problems:
        lines = listing([f"  {problem}" for problem in problems], "\n", MAX_LISTED)
        raise CheckpointError(f"{files.paths[0]} does not fit its config.json; nothing was loaded:\n{lines}{hint}")
    return weights


def _names_to_read(
    targets: Mapping[str, str | None], expected: Mapping[str, TensorInfo], wanted: Collection[str], layout: Layout
) -> set[str]:
    """Choose the stored names whose values are read.

    For a complete model every copy of the token embedding is read, to check that they are equal; but never the
    encoder's of the native layout next to the shared one, which alone embeds the prompts there. For a part of a model
    only the copies that the part uses are read, or any one where the file holds none of these.
    """
    names = {name for name, canonical in targets.items() if held_name(canonical, expected) in wanted}
    copies = sorted(names & _copies(targets, expected))
    if layout == "native" and any(targets[name] == SHARED for name in copies):
        names = {name for name in names if targets[name] != ENCODER_EMBEDDING}
    if len(wanted) == len(expected):
        return names
    own = [name for name in copies if name in names and targets[name] in (SHARED, ENCODER_EMBEDDING)]
    return names.difference(copies).union(own or copies[:1])


def _copies(targets: Mapping[str, str | None], expected: Mapping[str, TensorInfo]) -> set[str]:
    """Return the stored names of the token embedding."""
    return {name for name, canonical in targets.items() if held_name(canonical, expected) == SHARED}


def compare_tensors(
    stored: Mapping[str, TensorInfo],
    targets: Mapping[str, str | None],
    expected: Mapping[str, TensorInfo],
    wanted: Collection[str],
    layout: Layout,
) -> list[str]:
    """List unexpected, misshapen and missing tensors, a sentence each; `targets` has the canonical names."""
    problems = []
    for name, canonical in targets.items():
        needed = expected.get(held_name(canonical, expected) or "")
        if needed is None:
            problems.append(f"unexpected: {name} {list(stored[name].shape)}")
        elif wrong := _misfit(name, stored[name], canonical, needed, layout):
            problems.append(wrong)
    present = {held_name(canonical, expected) for canonical in targets.values()}
    for canonical, needed in expected.items():
        if canonical in wanted and canonical not in present and canonical not in OPTIONAL:
            problems.append(f"missing: {stored_name(canonical, layout)} {list(needed.shape)}")
    return problems


def _misfit(name: str, stored: TensorInfo, canonical: str | None, needed: TensorInfo, layout: Layout) -> str:
    """Return why a stored tensor does not fit the model's; an empty text when it does."""
    shape = stored.shape[::-1] if canonical in TRANSPOSED[layout] else stored.shape
    if shape != needed.shape:
        return f"misshapen: {name} is {list(shape)}, should be {list(needed.shape)}"
    assert stored.dtype is not None and needed.dtype is not None
    if stored.dtype.is_floating_point != needed.dtype.is_floating_point:
        return f"mistyped: {name} holds {stored.dtype}, should hold {needed.dtype}"
    return ""


def _hint(problems: Collection[str], prepared: bool) -> str:
    """Return a line about the function that prepares a model, where that may be the remedy."""
    if prepared:
        return f"\n{_NOT_HELD}" if any(problem.startswith("missing") for problem in problems) else ""
    return f"\n{_ADDED}" if any(problem.startswith("unexpected") for problem in problems) else ""
