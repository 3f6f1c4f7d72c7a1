"""Whether a part of the model still does what its class says, and no more: then a faster way may stand in for it.

Reading a module's weights instead of calling it gives the same numbers only if nothing in it was hooked, replaced,
subclassed or patched. What this cannot see is a replaced function of a module (`torch.nn.functional.gelu = ...`);
load the model with `attention="eager"` for such an experiment.
"""

import operator
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

Kinds = frozenset[type]


def is_unchanged(module: nn.Module, kinds: Kinds) -> bool:
    """Return whether calling `module` would do no more than the mathematics of its parts; see `find_change`."""
    return find_change(module, kinds) is None


def find_change(module: nn.Module, kinds: Kinds, path: str = "") -> str | None:
    """Return in words why calling `module` might do more than the mathematics of its parts; None if it does not.

    `kinds` are the exact classes whose mathematics the caller knows, `path` is where the module is in the model. In
    training, while gradients, autocast or a compiler is on, and where a class or an object has another method than when
    its module was imported, there is a reason.
    """
    mode = find_mode()
    if mode is not None:
        return mode
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a forward hook is registered on all modules"
    method = find_replaced_method(kinds)
    if method is not None:
        return f"{method} was replaced"
    for part in module.modules():
        reason = _find_change_of(part, kinds)
        if reason is not None:
            return f"{_path_of(part, module, path)} {reason}"
    return None


def find_mode() -> str | None:
    """Return in words the mode of torch, if any, in which only the plain operations are right."""
    if torch.compiler.is_compiling():
        return "torch.compile is at work"
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a torch function or dispatch mode is on"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is at work"
    return "torch.jit traces" if torch._C._is_tracing() else None


def _find_change_of(part: nn.Module, kinds: Kinds) -> str | None:
    kind: Any = type(part)
    if kind not in kinds:
        return f"is of the class {kind.__name__}, which the faster way does not know"
    if part.training:
        return "is in training mode"
    if part._forward_hooks or part._forward_pre_hooks:
        return "has a forward hook"
    if not _method_names(kind).isdisjoint(vars(part)):
        return f"has a replaced method, {min(_method_names(kind) & vars(part).keys())}"
    return None


class Watch:
    """A module in which `find_change` found nothing, so that asking again takes microseconds.

    It says "changed" too often rather than too rarely: then `find_change` is to be asked.
    """

    def __init__(self, module: nn.Module, kinds: Kinds):
        self._kinds = kinds
        self._parts = [
            (part, type(part), frozenset(vars(part)), tuple(part._modules.values())) for part in module.modules()
        ]

    def has_changed(self) -> bool:
        """Return whether anything that `find_change` looks at may be different from what it was."""
        if find_mode() is not None or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        if find_replaced_method(self._kinds) is not None:
            return True
        for part, kind, names, inner in self._parts:
            # a method that is hidden by an attribute is a new name
            if type(part) is not kind or vars(part).keys() != names or part.training:
                return True
            if part._forward_hooks or part._forward_pre_hooks:
                return True
            if inner and tuple(part._modules.values()) != inner:
                return True
        return False


def _path_of(part: nn.Module, module: nn.Module, path: str) -> str:
    inside = next(name for name, one in module.named_modules() if one is part)
    return ".".join(name for name in (path, inside) if name) or "it"


def find_replaced_method(kinds: Kinds) -> str | None:
    """Return a method of the classes, or of those they inherit from, that was replaced since import, if any."""
    if _calls() != _CALLS:
        return "nn.Module.__call__"
    for kind, known, values in _snapshot(kinds):
        now = vars(kind)
        if len(now) == len(values) and all(map(operator.is_, now.values(), values)):
            continue
        methods = _methods(kind)
        if methods != known:
            changed = (name for name in methods.keys() | known.keys() if methods.get(name) != known.get(name))
            return f"{kind.__name__}.{min(changed)}"
    return None


def _calls() -> tuple[object, ...]:
    return nn.Module.__call__, nn.Module._call_impl, nn.Module._wrapped_call_impl


_CALLS = _calls()


def remember(kinds: Kinds) -> Kinds:
    """Note the methods that `kinds` have now; call it when the module that knows them is imported."""
    _snapshot(kinds)
    return kinds


@cache
def _snapshot(kinds: Kinds) -> tuple[tuple[type, dict[str, object], tuple[object, ...]], ...]:
    """Return each class with its methods, and with all that it holds, which is compared sooner."""
    return tuple((kind, _methods(kind), tuple(vars(kind).values())) for kind in _with_parents(kinds))


def changed_methods(kinds: Kinds) -> list[str]:
    """Return the methods of the classes, such as "Linear.forward", that are not those of when they were remembered."""
    return [
        f"{kind.__qualname__}.{name}"
        for kind, known, _ in _snapshot(kinds)
        for name in sorted(known.keys() | _methods(kind).keys())
        if known.get(name) is not _methods(kind).get(name)
    ]


def _with_parents(kinds: Kinds) -> list[type]:
    """Return the classes and their parents, without nn.Module, which defines no mathematics."""
    parents = {parent for kind in kinds for parent in kind.__mro__}
    return sorted(parents - {nn.Module, object}, key=lambda kind: kind.__qualname__)


def _methods(kind: type) -> dict[str, object]:
    return {name: value for name, value in vars(kind).items() if callable(value) or isinstance(value, property)}


@cache
def _method_names(kind: Any) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))


def structure(module: nn.Module) -> tuple[object, ...]:
    """Return everything except the tensors that `module` computes with: its parts in order, and their plain values."""
    parts = module.named_modules(remove_duplicate=False)
    return tuple((name, id(part), *_plain_values(part).items()) for name, part in parts)


def _plain_values(part: nn.Module) -> dict[str, object]:
    plain = (int, float, str, tuple)
    return {name: value for name, value in vars(part).items() if isinstance(value, plain) or callable(value)}
