"""The place of every tensor of an adapter in the model: weights that matrices change, and tensors replaced whole."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from florence2.checkpoints.layouts import SHARED, TIED_TO_SHARED, to_canonical
from florence2.checkpoints.tensors import TensorInfo
from florence2.errors import MAX_LISTED, CheckpointError, listing
from florence2.fast.install import plain_class
from florence2.model.florence2 import Head

if TYPE_CHECKING:
    from florence2.checkpoints.adapters import AdapterConfig

COPY = ".base_layer.weight"
PEFT_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"
_MATRIX = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:(?<=vector)\.weight)?"
)
_PARTS = ("lora_A.weight", "lora_embedding_A", "lora_B.weight", "lora_embedding_B", _MAGNITUDE)
USES = frozenset((SHARED, *TIED_TO_SHARED))
"""The canonical names of the token embedding's uses."""


@dataclass(frozen=True)
class Change:
    """The change of one weight: the names of its matrices in the file, and the factor of their product.

    `magnitude` has the lengths of the rows, for DoRA.
    """

    a: str
    b: str
    scale: float
    magnitude: str | None = None


@dataclass(frozen=True)
class Plan:
    """All changes of a model: of weights by module path, and tensors that take the place of others, by their names."""

    changes: dict[str, Change] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)


def make_plan(
    modules: Mapping[str, nn.Module], headers: Mapping[str, TensorInfo], config: "AdapterConfig", file: Path
) -> Plan:
    """Find what changes each tensor. Raises CheckpointError listing all that does not fit."""
    problems: list[str] = []
    plan, matrices = Plan(), dict[str, dict[str, str]]()  # module path -> part -> name in the file
    scales: dict[str, float] = {}
    for name, info in headers.items():
        if name.endswith(COPY):
            continue  # a weight of the base model; see `find_foreign`
        match = _MATRIX.fullmatch(name)
        if match is None:
            problems += _plan_whole(name, info.shape, modules, plan)
            continue
        path = module_path(match["module"], modules)
        if path is None:
            problems.append(f"{name} belongs to a module that this model does not have")
        elif match["part"] in matrices.setdefault(path, {}):
            problems.append(f"{name} and {matrices[path][match['part']]} belong to the same module")
        else:
            module = match["module"].removeprefix(PEFT_PREFIX)
            matrices[path][match["part"]], scales[path] = name, config.scale_of(module)
            shapes = _shapes(modules[path], config.rank_of(module), config.dora)
            problems += _misfit(name, info.shape, match["part"], modules[path], shapes)
    for path, parts in matrices.items():
        if len(parts) == 2 + config.dora:
            a, b, *magnitude = (parts[part] for part in sorted(parts, key=_PARTS.index))
            plan.changes[path] = Change(a, b, scales[path], *magnitude)
        else:
            needed = "its two matrices and lengths" if config.dora else "its two matrices"
            problems.append(f"{path} has only some of {needed}: {', '.join(parts.values())}")
        if f"{path}.weight" in plan.whole:
            problems.append(f"{path} has both matrices and {plan.whole[f'{path}.weight']}")
    problems += _missing_whole(config.saved, modules, plan)
    used = USES & {*plan.whole, *(f"{path}.weight" for path in plan.changes)}
    if config.keeps_ties and used:
        problems.append(f"ensure_weight_tying is true for {', '.join(sorted(used))}, which is not implemented")
    if problems or not (plan.changes or plan.whole):
        raise misfits(file, problems or ["it holds no matrices"])
    return plan


def _missing_whole(saved: Iterable[str], modules: Mapping[str, nn.Module], plan: Plan) -> list[str]:
    """List the modules of the model that the adapter says were trained whole, and whose tensors the file lacks."""
    held = [stored.replace(".base_layer.", ".").rpartition(".")[0] for stored in plan.whole.values()]
    lacking = [name for name in saved if not any(_ends_with(module, name) for module in held)]
    return [
        f"modules_to_save names {name}, but the file holds no tensor of it"
        for name in lacking
        if any(_ends_with(path, name) for path in modules)
    ]


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _plan_whole(name: str, shape: tuple[int, ...], modules: Mapping[str, nn.Module], plan: Plan) -> list[str]:
    """Plan a tensor that takes the place of one of the model's; return the problems."""
    path, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
    owner = module_path(path, modules) if path else None
    if path.removeprefix(PEFT_PREFIX) == "language_model" and leaf == "final_logits_bias":
        owner = ""  # Microsoft's code keeps it there
    old = getattr(modules[owner], leaf, None) if owner is not None else None
    if not isinstance(old, Tensor):
        return [f"{name} is neither a LoRA matrix nor a tensor of this model"]
    target = f"{owner}.{leaf}" if owner else leaf
    if target in plan.whole:
        return [f"{name} and {plan.whole[target]} are the same tensor"]
    plan.whole[target] = name
    return [] if shape == tuple(old.shape) else [f"{name} is {list(shape)}, should be {list(old.shape)}"]


def module_path(module: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the path of the module that a file names; None when the model has no such module."""
    paths = {path for path in _possible_paths(module) if path in modules}
    assert len(paths) <= 1, f"{module} could be any of {paths}"
    return next(iter(paths), None)


def _possible_paths(module: str) -> Iterator[str]:
    """Yield the canonical paths that a name in the file may mean, by each of the three ways to name modules."""
    weight = module.removeprefix(PEFT_PREFIX) + ".weight"
    for canonical in (weight, to_canonical(weight, "microsoft"), to_canonical(weight, "native")):
        if canonical is not None:
            yield canonical.removesuffix(".weight")


def _misfit(
    name: str, shape: tuple[int, ...], part: str, module: nn.Module, expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """List the problems of one matrix."""
    if part == _MAGNITUDE and expected and part not in expected:
        return [f"{name} belongs to DoRA, but use_dora is false"]
    if part not in expected:
        return [f"{name} belongs to a {plain_class(type(module)).__name__}, into which it cannot be merged"]
    wanted = expected[part]
    return [] if shape == wanted else [f"{name} is {list(shape)}, should be {list(wanted)}"]


def _shapes(module: nn.Module, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices that can be merged into a module; empty for modules without any.

    A depthwise convolution has none, because with LoRA every channel would see all channels; nor has a text position
    table, which is not looked up by its input.
    """
    if isinstance(module, nn.Linear | Head) or (isinstance(module, nn.Conv2d) and module.groups == 1):
        rows, *columns = module.weight.shape
        ones = (1,) * len(columns[1:])
        length = {_MAGNITUDE: (1, rows, *ones) if ones else (rows,)} if dora else {}
        return {"lora_A.weight": (rank, *columns), "lora_B.weight": (rows, rank, *ones), **length}
    if type(module) is nn.Embedding:
        rows, width = module.weight.shape
        length = {_MAGNITUDE: (width,)} if dora else {}
        return {"lora_embedding_A": (rank, rows), "lora_embedding_B": (width, rank), **length}
    return {}


def misfits(file: Path, problems: list[str]) -> CheckpointError:
    """Return the error that lists all problems of an adapter's file."""
    lines = listing([f"  {problem}" for problem in problems], "\n", MAX_LISTED)
    return CheckpointError(f"{file} does not fit this model; nothing was merged:\n{lines}")
