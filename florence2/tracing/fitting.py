"""Fit a patch to the value that it changes: its shape, and masks of the positions and heads to which it is confined."""

from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from florence2.errors import OptionError
from florence2.tracing.names import Name


def fit(new: Any, value: Tensor, known: Name) -> Tensor:
    """Return `new` in place of `value`: of its shape, or of one request alone and then used for the whole batch.

    Raises OptionError, with both shapes, for any other shape, and for complex numbers.
    """
    if not isinstance(new, Tensor):
        raise OptionError(f"The patch of {known.name} returned {type(new).__name__}; it must return a tensor.")
    if not torch.can_cast(new.dtype, value.dtype):
        raise OptionError(f"The patch of {known.name} has type {new.dtype}, which cannot be cast to {value.dtype}.")
    given: Tensor = new.to(value.device, value.dtype)
    if given.shape == value.shape:
        return given
    if given.shape == _alone(value, known):
        return _for_all(given, value, known)
    raise OptionError(
        f"The patch of {known.name} has the shape {tuple(new.shape)}, but the value there has "
        f"{tuple(value.shape)}, ({', '.join(known.shape)}); give it that shape, or leave B out."
    )


def _alone(value: Tensor, known: Name) -> tuple[int, ...] | None:
    """Return the shape of a value without the B of its batch; None where the shape alone does not show it."""
    if known.shape[:1] == ("B",):
        return tuple(value.shape[1:])
    return None if known.shape[:1] != ("B·K",) else tuple(value.shape[2 if known.shape[1:2] == ("1",) else 1 :])


def _for_all(new: Tensor, value: Tensor, known: Name) -> Tensor:
    """Expand a value without its batch (for rows of beams, without its beam) to every row of `value`."""
    if known.shape[:2] == ("B·K", "1"):
        new = new[None]
    return new[None].expand_as(value)


def check_numbers(argument: str, numbers: Any) -> None:
    """Raise OptionError unless `numbers` is None or several whole numbers from 0; positions may be a slice."""
    if numbers is None or (isinstance(numbers, slice) and argument == "positions"):
        return
    several = isinstance(numbers, Collection | Tensor) and not isinstance(numbers, str)
    if not several or not all(_is_index(number) for number in numbers):
        raise OptionError(f"{argument} is {str(numbers)[:60]}; it must be several whole numbers from 0, as [3].")


def _is_index(number: Any) -> bool:
    """Return whether it is a whole number from 0, of Python, NumPy or PyTorch; truth values do not count."""
    if isinstance(number, Tensor):
        whole = not (number.dtype.is_floating_point or number.dtype.is_complex or number.dtype == torch.bool)
        return whole and number.dim() == 0 and bool(number >= 0)
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 0


def head_dim(name: Name) -> int:
    """Return the dimension that counts heads or groups. Raises OptionError when there is none."""
    dims = name.dims("heads", "G")
    if not dims:
        raise OptionError(f"{name.name} has no heads: its shape is ({', '.join(name.shape)}).")
    return dims[0]


def position_dims(name: Name) -> list[int]:
    """Return the last dimension that counts positions, or the two dimensions of a grid.

    Raises OptionError when there is none.
    """
    if grid := name.dims("h", "w"):
        return grid
    dims = name.dims("S", "N", "P", "M", "h·w")
    if not dims:
        raise OptionError(f"{name.name} has no positions to choose from: its shape is ({', '.join(name.shape)}).")
    return dims[-1:]


def mask(value: Tensor, dims: Sequence[int], chosen: Sequence[int] | slice, name: Name, thing: str) -> Tensor:
    """Return a mask, broadcastable to `value`, that is True at the `chosen` indices of `dims` taken as one.

    Raises OptionError for an index that does not exist; `thing` is its word for the message.
    """
    sizes = [value.shape[dim] for dim in dims]
    total = torch.Size(sizes).numel()
    indices = range(total)[chosen] if isinstance(chosen, slice) else [int(i) for i in chosen]
    wrong = [i for i in indices if not 0 <= i < total]
    if wrong:
        raise OptionError(f"{name.name} has {total} {thing}s, 0 to {total - 1}; {thing} {wrong[0]} does not exist.")
    mask = torch.zeros(total, dtype=torch.bool, device=value.device)
    mask[list(indices)] = True
    shape = [1] * value.dim()
    for dim, size in zip(dims, sizes, strict=True):
        shape[dim] = size
    return mask.view(shape)
