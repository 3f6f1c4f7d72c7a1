"""A model against what its configuration describes: whatever a checkpoint would lose is named before it is written."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint as recompute

from florence2.checkpoints.checks.empty import Prepare, aliases, empty_model, first_names
from florence2.errors import MAX_LISTED, CheckpointError, ConfigError, listing, shown
from florence2.fast.install import plain_class
from florence2.fast.unchanged import changed_methods, remember
from florence2.model import bart, davit, projection
from florence2.model.config import find_problems
from florence2.model.florence2 import Florence2Model, Head

_REMEDY = (
    "Settings of the configuration come back with load(..., changes={...}); everything else with a function that "
    "makes the change, given as prepare= to both save and load. torch.save(model.state_dict(), FILE) keeps the "
    "values alone."
)
_IGNORED = frozenset(
    # the mode and the kernel of attention belong to a use of the model; the sizes are those of the tensors
    "training attention config in_features out_features in_channels out_channels".split()
)
_TORCH = frozenset(vars(nn.Module()))  # what torch keeps about a module; hooks and tensors are compared on their own
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
    "_state_dict_pre_hooks": "state_dict pre-hook",
    "_state_dict_hooks": "state_dict hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict post-hook",
}
_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
_UNSTORED = "non-persistent buffer"
_EMPTY = "a cell without contents"
_DEPTH = 6  # how far values inside values are compared; a closure may hold itself


def _module_classes() -> frozenset[type[nn.Module]]:
    defined = (value for room in (bart, davit, projection) for value in vars(room).values())
    own = {value for value in defined if isinstance(value, type) and issubclass(value, nn.Module)}
    return frozenset({*own, Florence2Model, Head, nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Embedding})


_CLASSES = remember(_module_classes())


def require_described(model: Florence2Model, prepare: Prepare | None = None) -> None:
    """Raise CheckpointError unless the configuration of `model`, and `prepare`, describe all but its values.

    Args:
        model: A complete model.
        prepare: The function that `load` will be given.

    Raises:
        CheckpointError: A module, a setting, a tensor, a method or a hook would not come back; all are listed.
        ConfigError: No model can be built of `model.config`.
    """
    wrong = find_problems(model.config.vision, model.config.text)
    if wrong:
        raise ConfigError(f"model.config cannot be saved: {listing(wrong, '; ')}.")
    differences = find_differences(model, empty_model(model.config, prepare=prepare))
    if differences:
        described = "its configuration" if prepare is None else "its configuration and the prepare function"
        lines = listing([f"  {difference}" for difference in differences], "\n", MAX_LISTED)
        raise CheckpointError(
            f"This model is not the one that {described} would bring back; nothing was written:\n{lines}\n{_REMEDY}"
        )


def find_differences(model: nn.Module, reference: nn.Module) -> list[str]:
    """List how `model` differs from `reference` in all but the values of stored tensors, a sentence each."""
    differences = [f"the method {name} was replaced on its class" for name in changed_methods(_CLASSES)]
    differences += [f"torch runs {hooks.strip('_')} on every module" for hooks in _GLOBAL_HOOKS if _all_hooks(hooks)]
    own, described = _modules(model), _modules(reference)
    foreign: list[str] = []  # paths of modules inside which nothing can be compared
    for path, module in own.items():
        if _is_inside(path, foreign):
            continue
        wrong = _compare_class(path, module, described.get(path))
        if wrong:
            foreign.append(path)
            differences.append(wrong)
        else:
            differences += _compare_module(path, module, described[path])
    for path in described:
        if path not in own and not _is_inside(path, foreign):
            foreign.append(path)
            differences.append(f"{path} is missing")
    return [*differences, *_compare_sharing(model, reference, foreign)]


def _all_hooks(name: str) -> Mapping[int, Any]:
    hooks: Mapping[int, Any] = getattr(torch_module, name)
    return hooks


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _is_inside(path: str, foreign: list[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") or not other for other in foreign)


def _compare_class(path: str, module: nn.Module, twin: nn.Module | None) -> str:
    """Return why a module is not of the class that is described; an empty text when it is."""
    if twin is None:
        return f"{path}, a module of the class {plain_class(type(module)).__name__}, is not described"
    if _class_name(module) == _class_name(twin):
        return ""
    return f"{path or 'the model'} is of the class {plain_class(type(module)).__name__}, not {type(twin).__name__}"


def _class_name(value: object) -> str:
    kind = plain_class(type(value))
    return f"{kind.__module__}.{kind.__qualname__}"  # by name: a prepare function may define its classes at each call


def _compare_module(path: str, module: nn.Module, twin: nn.Module) -> Iterator[str]:
    """Yield the differences of two modules of one class, without their children."""
    prefix = f"{path}." if path else "model."
    yield from _compare_tensors(path, module, twin)
    own, described = vars(module), vars(twin)
    for name, value in described.items():
        if name in _TORCH or name in _IGNORED or not hasattr(module, name):
            continue  # a setting that became a module is reported as that
        if name in own and not _same(own[name], value):
            yield f"{prefix}{name} is {_word(own[name])}, not {_word(value)}"
    for name in own.keys() - described.keys():
        if callable(getattr(type(module), name, None)) and not _is_recomputed(module, own[name]):
            yield f"{prefix}{name} was replaced on this instance"
    for attribute, word in _HOOKS.items():
        hooks, needed = (list(getattr(part, attribute, {}).values()) for part in (module, twin))
        if not _same(hooks, needed):
            names = ", ".join(map(_word, hooks)) or "none"
            yield f"{path or 'the model'} has another {word} than described: {names}"


def _is_recomputed(module: nn.Module, method: object) -> bool:
    """Return whether a method was replaced for gradient checkpointing, which changes no value."""
    if not isinstance(method, partial) or method.func is not recompute:
        return False
    return getattr(method.args[0], "__func__", None) is type(module).forward


def _compare_tensors(path: str, module: nn.Module, twin: nn.Module) -> Iterator[str]:
    """Yield the differences of the tensors that two modules hold themselves."""
    own, described = _own_tensors(module), _own_tensors(twin)
    prefix = f"{path}." if path else ""
    for name in sorted(described.keys() - own.keys()):
        yield f"{prefix}{name} is missing"
    for name, (kind, tensor) in own.items():
        if name not in described:
            yield f"{prefix}{name} {list(tensor.shape)}, a {kind}, is not described"
            continue
        other_kind, other = described[name]
        if kind != other_kind:
            yield f"{prefix}{name} is a {kind}, not a {other_kind}"
        elif tensor.shape != other.shape:
            yield f"{prefix}{name} is {list(tensor.shape)}, not {list(other.shape)}"
        elif tensor.is_floating_point() != other.is_floating_point():
            yield f"{prefix}{name} is of type {tensor.dtype}, not {other.dtype}"
        elif kind == _UNSTORED and not _same(tensor, other):
            yield f"{prefix}{name} has other values than described, and no checkpoint holds it"


def _own_tensors(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return kind and value of each tensor of a module."""
    kinds = dict.fromkeys(module._parameters, "parameter")
    for name in module._buffers:
        kinds[name] = _UNSTORED if name in module._non_persistent_buffers_set else "buffer"
    held = {**module._parameters, **module._buffers}
    return {name: (kinds[name], tensor) for name, tensor in held.items() if tensor is not None}


def _compare_sharing(model: nn.Module, reference: nn.Module, foreign: list[str]) -> Iterator[str]:
    """Yield the modules and tensors that have several names in one of the models only."""
    modules = [first_names(part.named_modules(remove_duplicate=False)) for part in (model, reference)]
    for own, described in (modules, (aliases(model), aliases(reference))):
        for name in sorted(own.keys() | described.keys()):
            if own.get(name) != described.get(name) and not _is_inside(name, foreign):
                foreign.append(name)
                yield f"{name} {'is' if name in own else 'is not'} the same as {own.get(name) or described.get(name)}"


# ---- values --------------------------------------------------------------------------------------------------------


def _same(one: Any, other: Any, depth: int = _DEPTH) -> bool:
    """Return whether two values would do the same: functions by their code, objects by their class and attributes."""
    if one is other or depth == 0:
        return True
    if isinstance(one, bool | int | float) and isinstance(other, bool | int | float):
        return one == other
    if isinstance(one, nn.Module) and isinstance(other, nn.Module):
        return _class_name(one) == _class_name(other)
    if type(one) is not type(other) and not isinstance(one, Tensor):
        return _class_name(one) == _class_name(other) and _same_attributes(one, other, depth)
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and _same_values(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b, depth - 1) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return _same_parts(one, other, depth)
    parts = _PARTS.get(type(one))
    if parts is not None:
        return all(_same(a, b, depth - 1) for a, b in zip(parts(one), parts(other), strict=True))
    return _same_attributes(one, other, depth) if hasattr(one, "__dict__") else _equal(one, other)


def _same_attributes(one: Any, other: Any, depth: int) -> bool:
    return _same_parts(getattr(one, "__dict__", {}), getattr(other, "__dict__", {}), depth)


def _equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal, arrays in all their elements."""
    equal = one == other
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


def _same_parts(one: Mapping[Any, Any], other: Mapping[Any, Any], depth: int) -> bool:
    return one.keys() == other.keys() and all(_same(one[key], other[key], depth - 1) for key in one)


def _same_values(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.is_meta != other.is_meta:
        return False
    return one.is_meta or torch.equal(one, other.to(one))


_PARTS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    FunctionType: lambda f: (f.__code__, f.__defaults__, f.__kwdefaults__, _closure(f)),
    MethodType: lambda method: (method.__func__, method.__self__),
    partial: lambda f: (f.func, f.args, f.keywords),
}
"""What decides about functions of each kind."""


def _closure(function: FunctionType) -> tuple[Any, ...]:
    """Return the values that a function took from the one around it; an empty cell stands for itself."""
    return tuple(map(_contents, function.__closure__ or ()))


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _word(value: Any) -> str:
    """Return the name of a function, and any other value as it would be written."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return name if isinstance(name, str) else shown(value)
