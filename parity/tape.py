"""A stand-in for CUDA graphs that runs on any device: a tape of torch's operations, replayed on the same tensors.

Like a graph, a tape knows nothing of Python: control flow, shapes and numbers are those of the recording, and it reads
and writes where tensors lay then. It refuses what a graph cannot hold: whatever asks the host for a value, or takes one
from it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_aten: Any = torch.ops.aten
_REFUSED = {
    *(_aten._local_scalar_dense, _aten.is_nonzero, _aten.item, _aten.equal, _aten.nonzero, _aten.masked_select),
    *(_aten._unique2, _aten.unique_dim, _aten.bincount, _aten.lift_fresh, _aten.lift_fresh_copy),
}
_BY_INDEX = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten.repeat_interleave}


class NotRecordableError(AssertionError):
    """Work that a CUDA graph could not hold."""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations inside a `with` block, whose effects are undone at its end; calling it does them again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, Any, list[tuple[int, int]]]] = []
        self._made: dict[int, int] = {}  # tensors that the work made: their ids, and their places on the tape
        self._kept: list[Any] = []  # so that no id is used twice
        self._before: dict[int, tuple[Any, Any]] = {}  # what was written over

    def __exit__(self, *details: Any) -> None:
        """Stop recording and restore what was written over."""
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation and note it."""
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        _check(func, flat)
        if func._schema.is_mutable:
            self._save(flat)
        noted = tree_map(lambda each: self._note(each) if isinstance(each, Tensor) else each, (list(args), kwargs))
        result = func(*args, **kwargs)
        made = []
        for place, each in enumerate(tree_flatten(result)[0]):
            if isinstance(each, Tensor) and not any(each is value for value in flat):
                self._made[id(each)] = len(self._kept)
                made.append((place, len(self._kept)))
                self._kept.append(each)
        self._calls.append((func, *noted, made))
        return result

    def __call__(self) -> None:
        """Do all operations again."""
        made: dict[int, Any] = {}
        for func, args, kwargs, places in self._calls:
            result = func(*_filled(args, made), **{name: _filled(each, made) for name, each in kwargs.items()})
            result = [result] if isinstance(result, Tensor) else tree_flatten(result)[0]
            for place, name in places:
                made[name] = result[place]

    def _note(self, tensor: Tensor) -> Any:
        place = self._made.get(id(tensor))
        if place is not None:
            return _Made(place)
        self._kept.append(tensor)
        # an alias, so that `tensor.data = other` later does not change what the tape reads
        with torch.utils._python_dispatch._disable_current_modes():
            return tensor.detach()

    def _save(self, flat: list[Any]) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            for each in flat:
                if isinstance(each, Tensor):
                    storage = each.untyped_storage()
                    self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))  # type: ignore[no-untyped-call]


class _Made:
    """A tensor that an earlier operation of the tape makes."""

    def __init__(self, place: int):
        self.place = place


def _filled(value: Any, made: dict[int, Any]) -> Any:
    """Put what this replay has made into arguments; torch's operations have lists in them, and nothing deeper."""
    if isinstance(value, _Made):
        return made[value.place]
    return [_filled(each, made) for each in value] if isinstance(value, list) else value


def _check(func: Any, flat: list[Any]) -> None:
    packet = func.overloadpacket
    by_mask = packet in _BY_INDEX and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in flat[1:])
    if packet in _REFUSED or by_mask:
        raise NotRecordableError(f"{func} asks the host for a value, or takes one from it.")


class TapeRecorder:
    """Records tapes and counts them.

    Attributes:
        recorded: How many tapes were recorded.
        replayed: How often any was replayed.
    """

    def __init__(self, size: int = 0) -> None:
        """Make a recorder whose tapes are counted with `size` bytes each."""
        self.size = size
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]:  # noqa: ARG002
        """Record `work` without doing it."""
        self.recorded += 1
        with Tape() as tape:
            work()

        def replay() -> None:
            self.replayed += 1
            tape()

        replay.size = self.size  # type: ignore[attr-defined]
        return replay
