"""Models of names and shapes, without values: what a checkpoint must fill, and what a model is compared with."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from florence2.checkpoints.layouts import cannot_be_stored
from florence2.checkpoints.tensors import TensorInfo
from florence2.errors import CheckpointError, OptionError, listing, shown
from florence2.model.attention import AttentionKind
from florence2.model.config import Florence2Config
from florence2.model.florence2 import Florence2Model

Prepare: TypeAlias = Callable[[Florence2Model], object]
"""Changes the empty model before a checkpoint fills it: adds or replaces modules, makes them smaller, hooks them.

It gets the model on the meta device, with names and shapes and without values. Modules that it makes on the default
device are real; the checkpoint's values replace those of their parameters and persistent buffers. Buffers with
`persistent=False` keep the values that it gave them and move to the model's device and type. Random numbers are drawn
from a fixed seed. A hook should hold modules, not parameters: loading replaces these.
"""


def empty_model(
    config: Florence2Config, attention: AttentionKind = "sdpa", prepare: Prepare | None = None
) -> Florence2Model:
    """Build a model of names and shapes, and let `prepare` change it.

    Raises CheckpointError for a name that no layout can hold.
    """
    with torch.device("meta"), _Unfilled():
        model = Florence2Model(config, attention)
    if prepare is None:
        return model
    if not callable(prepare):
        raise OptionError(f"prepare is {shown(prepare)}; it must be a function that changes the empty model.")
    described = set(model.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        prepare(model)
    if not isinstance(model.config, Florence2Config):
        raise CheckpointError(
            f"prepare replaces the model's configuration by {shown(model.config)}; it must stay a Florence2Config."
        )
    names = model.state_dict()
    taken = [
        name
        for name in names
        if name not in described and (cannot_be_stored(name, "microsoft") or cannot_be_stored(name, "native"))
    ]
    if taken:
        raise CheckpointError(
            f"prepare adds {listing(taken)}; a checkpoint keeps this name for the token embedding or another tensor, "
            "so choose another name for the module."
        )
    opaque = [name for name, value in names.items() if not isinstance(value, Tensor)]
    if opaque:
        raise CheckpointError(f"prepare adds {listing(opaque)}; a checkpoint can only hold tensors.")
    return model


def function_name(prepare: Prepare) -> str:
    """Return MODULE:FUNCTION, for people; a checkpoint names the function that it needs, and never imports it."""
    named = prepare if hasattr(prepare, "__qualname__") else type(prepare)
    module = "MODULE" if named.__module__ == "__main__" else named.__module__  # a script's own name leads nowhere
    return f"{module}:{named.__qualname__}"


class _Unfilled(TorchFunctionMode):
    """A mode in which new parameters get no random values.

    The meta device has none to draw, and `normal_` makes torch import its compiler there, which takes as long as
    reading the base checkpoint.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return None  # the modules ignore the results of these functions
        return func(*args, **(kwargs or {}))


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of `model` holds, by canonical name; a shared one under its first name."""
    further = aliases(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in further}


def expected_tensors(model: nn.Module) -> dict[str, TensorInfo]:
    """Return shape and type of each of `stored_tensors`."""
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in stored_tensors(model).items()}


def aliases(model: nn.Module) -> dict[str, str]:
    """Return the first name of a tensor for each further name that the model holds it under."""
    return first_names([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def first_names(named: Iterable[tuple[str, object]]) -> dict[str, str]:
    """Return for each further name of an object its first name."""
    first: dict[int, str] = {}
    return {name: first[id(value)] for name, value in named if first.setdefault(id(value), name) != name}


def fill(model: nn.Module, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Give an empty model the values of `stored_tensors`, and move the buffers that are not stored to them."""
    shared = aliases(model)
    values = weights | {name: weights[first] for name, first in shared.items() if first in weights}
    model.load_state_dict(values, strict=True, assign=True)
    for name, first in shared.items():  # assigning made a parameter of each name
        _set_tensor(model, name, _get_tensor(model, first))
    left = _move_unstored(model, device, dtype)
    if left:
        raise CheckpointError(
            f"prepare leaves {listing(sorted(left))} on the meta device, without values, and a checkpoint does not "
            "hold buffers that are not persistent; make them on the CPU."
        )


def _move_unstored(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Collection[str]:
    """Move the buffers that are not persistent; return the names of those without values."""
    left = []
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is None:
                continue
            if buffer.is_meta:
                left.append(f"{path}.{name}")
            else:
                module._buffers[name] = buffer.to(device, dtype if buffer.is_floating_point() else buffer.dtype)
    return left


def _get_tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)
