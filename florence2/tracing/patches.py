"""`f.patched({...})`: a run with some of its values changed.

    with f.patched({"decoder.layers.2.cross_attention.heads": zero_heads([3])}):
        f.run("<CAPTION>", "photo.jpg")

A patch is a value: a tensor that takes the place of what was computed, any function of a tensor, or one of those made
here: `zero()`, `scale(0.5)`, `zero_heads([3])`, `replace(tensor)`, `from_run(run)`, and `at(patch, ...)`, which
confines another to some steps, positions or heads. Names are those of `florence2.tracing.names`; a pattern patches
every value that it matches, and nothing below.

Patches are in force in their block alone, in its thread or task: nothing is written into the model, so they undo
themselves, and other threads may use it meanwhile. Blocks nest, the outer one's patches coming first.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from florence2.errors import OptionError
from florence2.model.config import Florence2Config
from florence2.model.trace import Trace, TraceBlock
from florence2.tracing.names import Name, names_of, select
from florence2.tracing.owner import Traceable
from florence2.tracing.recording import Tracing
from florence2.tracing.runs import Run, TracedPicture

Change: TypeAlias = Callable[[Tensor, Name, int], Tensor]
"""(the value, its name, the step that it is of, 0 for what is computed once) -> what the run shall go on with."""
PatchLike: TypeAlias = "Patch | Tensor | Callable[[Tensor], Tensor]"


@dataclass(frozen=True)
class Patch:
    """A change of one value, with words for it that tell it from others; it must not write into what it is given."""

    change: Change
    words: str = "a patch"

    def __repr__(self) -> str:
        return self.words


def patched(f: Traceable, patches: Mapping[str, PatchLike]) -> TraceBlock:
    """A block in which every run of `f` in this thread goes on with what `patches` make of the values they name.

    Keys are names or patterns of them, values as the module says. Where two patterns name one value, both patches act,
    in the order of the mapping. The block may be kept and entered as often as one likes, by several threads at once
    too. Raises OptionError for a name that does not exist, and, when the value is computed, for a patch of the wrong
    shape.
    """
    return TraceBlock(f, partial(_Patching, choose_patches(f.model.config, patches)), patches=True)


def choose_patches(config: Florence2Config, patches: Mapping[str, PatchLike]) -> dict[str, tuple[Name, list[Patch]]]:
    """The patches of every single name. Raises OptionError for what cannot be patched."""
    if not isinstance(patches, Mapping):
        raise OptionError(f"Patches are {str(patches)[:60]!r}; they must map names to them, as {{'memory': zero()}}.")
    known = {name.name: name for name in names_of(config) if not name.searched}
    chosen: dict[str, tuple[Name, list[Patch]]] = {}
    for pattern, names in select(patches, list(known.values()), exactly=True).items():
        patch = as_patch(pattern, patches[pattern])
        for name in names:
            chosen.setdefault(name, (known[name], []))[1].append(patch)
    return chosen


def as_patch(pattern: str, patch: PatchLike) -> Patch:
    """Anything that may stand in a mapping of patches, as a Patch."""
    if isinstance(patch, Patch):
        return patch
    if isinstance(patch, Tensor):
        return replace(patch)
    if callable(patch):
        change = patch  # given a copy, so that one that writes into it changes no encoded picture and no other trace
        return Patch(lambda value, name, step: change(value.clone()), "a function")  # noqa: ARG005
    raise OptionError(
        f"The patch of {pattern} is {str(patch)[:60]!r}; it must be a tensor, a function of one, or a Patch such as "
        "zero()."
    )


class _Patching(Trace):
    """The patches of one call: counts the steps."""

    def __init__(self, chosen: Mapping[str, tuple[Name, list[Patch]]]):
        self.chosen = chosen
        self.seen: dict[str, int] = {}
        self._entered = {
            ".".join(parts[:end]) for parts in (name.split(".") for name in chosen) for end in range(1, len(parts))
        }

    def wants(self, name: str) -> bool:
        return name in self.chosen

    def enters(self, prefix: str) -> bool:
        return prefix in self._entered

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name not in self.chosen:
            return value
        known, patches = self.chosen[name]
        step = self.seen[name] = self.seen.get(name, -1) + 1
        for patch in patches:
            value = fit(patch.change(value, known, step), value, known)
        return value


def fit(new: Any, value: Tensor, known: Name) -> Tensor:
    """`new` in place of `value`: of its shape, or of one request alone, which then serves all of the batch.

    Raises OptionError, with both shapes, for any other, and for complex numbers.
    """
    if not isinstance(new, Tensor):
        raise OptionError(f"The patch of {known.name} gave {type(new).__name__}, not a tensor.")
    if not torch.can_cast(new.dtype, value.dtype):
        raise OptionError(f"The patch of {known.name} is of {new.dtype}, which does not go into {value.dtype}.")
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
    """The shape of a value without the B of its batch; None where that cannot be told from the shape alone."""
    if known.shape[0] == "B":
        return tuple(value.shape[1:])
    return None if known.shape[0] != "B·K" else tuple(value.shape[2 if known.shape[1] == "1" else 1 :])


def _for_all(new: Tensor, value: Tensor, known: Name) -> Tensor:
    """Without its batch (and for rows of beams, without its beam) -> for every row of `value`."""
    if known.shape[:2] == ("B·K", "1"):
        new = new[None]
    return new[None].expand_as(value)


def zero() -> Patch:
    """Nothing in place of what was computed."""
    return Patch(lambda value, name, step: torch.zeros_like(value), "zero()")  # noqa: ARG005


def scale(factor: float) -> Patch:
    """What was computed, times `factor`. Raises OptionError when that is no number."""
    if not isinstance(factor, Real):
        raise OptionError(f"The factor of scale is {str(factor)[:60]!r}; it must be a number.")
    return Patch(lambda value, name, step: value * factor, f"scale({factor})")  # noqa: ARG005


def replace(new: Tensor) -> Patch:
    """`new` in place of what was computed: of its shape, or of the shape without B, which then serves every request.

    Raises OptionError when it is no tensor.
    """
    if not isinstance(new, Tensor):
        raise OptionError(f"replace takes a tensor, not {type(new).__name__}; torch.as_tensor makes one of numbers.")
    return Patch(lambda value, name, step: new, f"replace({tuple(new.shape)})")  # noqa: ARG005


def zero_heads(heads: Collection[int]) -> Patch:
    """Nothing from these heads; for names whose shape has heads or groups, as `...cross_attention.heads`."""
    return at(zero(), heads=heads)


def scale_heads(heads: Collection[int], factor: float) -> Patch:
    """These heads times `factor`; otherwise as `zero_heads`."""
    return at(scale(factor), heads=heads)


def from_run(source: Run | TracedPicture | Tracing) -> Patch:
    """What another run had at the same name, in the same step; a run without that step leaves the value as it is.

    `source` is a run or a picture of a trace, or a trace that holds only one. The trace must have kept the name, and
    the values must have the same shape: the same number of beams, and where positions of the memory count, prompts
    of the same length. Raises OptionError for any other source, and where the value is computed for what it lacks.
    """
    if not isinstance(source, Run | TracedPicture | Tracing):
        raise OptionError(f"from_run takes a trace, or one of its runs or pictures, not {type(source).__name__}.")
    return Patch(partial(_take_from, source), "from_run(...)")


def _take_from(source: Run | TracedPicture | Tracing, value: Tensor, name: Name, step: int) -> Tensor:
    if isinstance(source, Tracing):
        picture = name.when == "picture" and len(source.pictures) == 1
        source = source.pictures[0] if picture else source.run
    if isinstance(source, Run) and name.when == "picture":
        source = source.picture
    found = source.batched(name.name)
    if step >= len(found):
        return value
    new, first = found[step], name.shape[0]
    if first == "B" or new.shape == value.shape:
        return new[0] if first == "B" else new
    copies = value.shape[0] // new.shape[0]
    return new.repeat(copies, *[1] * (new.dim() - 1)) if copies * new.shape[0] == value.shape[0] else new


def at(
    patch: PatchLike,
    *,
    steps: Collection[int] | None = None,
    positions: Sequence[int] | slice | None = None,
    heads: Collection[int] | None = None,
) -> Patch:
    """Another patch, confined to some `steps` of the answer (from 0), `positions`, and `heads` or groups.

    Positions are those of the value's sequence: of the memory (S), the image tokens (N), the prompt (P), or the grid
    (h x w, counted row by row); of weights and of the memory's keys and values, the positions looked at. The change is
    computed on the whole value, and taken over where all that is given holds. Raises OptionError for anything but
    whole numbers, and, when the value is computed, where it has no such dimension or not so many.
    """
    inner = as_patch("at(...)", patch)
    given = {"steps": steps, "positions": positions, "heads": heads}
    for key, numbers in given.items():
        _check_numbers(key, numbers)
    words = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)

    def change(value: Tensor, name: Name, step: int) -> Tensor:
        if steps is not None and step not in steps:
            return value
        new = fit(inner.change(value, name, step), value, name)
        chosen = torch.ones(value.shape, dtype=torch.bool, device=value.device)
        if heads is not None:
            chosen &= _along(value, [_head_dim(name)], list(heads), name, "head")
        if positions is not None:
            chosen &= _along(value, _position_dims(name), positions, name, "position")
        return torch.where(chosen, new, value)

    return Patch(change, f"at({inner!r}, {words})")


def _check_numbers(what: str, given: Any) -> None:
    """Raises OptionError for what is neither left out nor several whole numbers from 0; positions may be a slice."""
    if given is None or (isinstance(given, slice) and what == "positions"):
        return
    several = isinstance(given, Collection | Tensor) and not isinstance(given, str)
    if not several or not all(_is_index(number) for number in given):
        raise OptionError(f"{what} is {str(given)[:60]}; it must be several whole numbers from 0, as [3].")


def _is_index(number: Any) -> bool:
    """Whether it is a whole number from 0, of Python, NumPy or PyTorch; a truth value is none."""
    if isinstance(number, Tensor):
        whole = not (number.dtype.is_floating_point or number.dtype.is_complex or number.dtype == torch.bool)
        return whole and number.dim() == 0 and bool(number >= 0)
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 0


def _head_dim(name: Name) -> int:
    for dim, letter in enumerate(name.shape):
        if letter in ("heads", "G"):
            return dim
    raise OptionError(f"{name.name} has no heads: its shape is ({', '.join(name.shape)}).")


def _position_dims(name: Name) -> list[int]:
    """The last dimension that counts positions, or the two of a grid."""
    if "h" in name.shape:
        return [name.shape.index("h"), name.shape.index("w")]
    dims = [dim for dim, letter in enumerate(name.shape) if letter in ("S", "N", "P", "M", "h·w")]
    if not dims:
        raise OptionError(f"{name.name} has no positions to choose from: its shape is ({', '.join(name.shape)}).")
    return dims[-1:]


def _along(value: Tensor, dims: Sequence[int], chosen: Sequence[int] | slice, name: Name, what: str) -> Tensor:
    """A mask that is True at the `chosen` indices of `dims`, taken as one; broadcastable to `value`."""
    sizes = [value.shape[dim] for dim in dims]
    total = torch.Size(sizes).numel()
    indices = range(total)[chosen] if isinstance(chosen, slice) else [int(i) for i in chosen]
    wrong = [i for i in indices if not 0 <= i < total]
    if wrong:
        raise OptionError(f"{name.name} has the {what}s 0 to {total - 1}, so there is no {what} {wrong[0]}.")
    mask = torch.zeros(total, dtype=torch.bool, device=value.device)
    mask[list(indices)] = True
    shape = [1] * value.dim()
    for dim, size in zip(dims, sizes, strict=True):
        shape[dim] = size
    return mask.view(shape)
