"""`f.patched({...})`: run the model with some of its values changed.

    from florence2.inspect import patches

    with f.patched({"decoder.layers.2.cross_attention.heads": patches.zero_heads([3])}):
        f.run("<CAPTION>", "photo.jpg")

A patch is a tensor that replaces what was computed, any function of a tensor, or one of those made here: `zero()`,
`scale(0.5)`, `zero_heads([3])`, `scale_heads([3], 0.5)`, `replace(tensor)`, `from_run(run)`, and `at(patch, ...)`,
which confines another patch to some steps, positions or heads. Names are those of `florence2.tracing.names`; a pattern
patches every value that it matches, and nothing below it.

Patches act only within their block, in its thread or task. Nothing is written into the model, so they leave no trace
after the block, and other threads may use the model meanwhile. Blocks nest; the outer patches act first.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

from florence2.asking.requests import EncodedImage
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.model.trace import Trace, TraceBlock
from florence2.tracing.fitting import check_numbers, fit, head_dim, mask, position_dims
from florence2.tracing.names import Name, When, names_of
from florence2.tracing.owner import Traceable
from florence2.tracing.recording import Tracing
from florence2.tracing.runs import Run, TracedImage
from florence2.tracing.selection import (
    CallSizes,
    OpenPatterns,
    Unknown,
    name_value,
    prefixes,
    select,
    warn_not_recorded,
)

PatchFunction: TypeAlias = Callable[[Tensor, Name, int], Tensor]
"""(value, its name, its step, 0 for values computed once) -> the value with which the run continues."""
PatchLike: TypeAlias = "Patch | Tensor | Callable[[Tensor], Tensor]"


@dataclass(frozen=True)
class Patch:
    """A change of one value, with a description for messages. `function` must not write into its argument."""

    function: PatchFunction
    description: str = "a patch"

    def __repr__(self) -> str:
        return self.description


def patched(f: Traceable, patches: Mapping[str, PatchLike], *, unknown: Unknown = "refuse") -> "PatchBlock":
    """Make a block in which every run of `f`, in this thread or task, uses patched values; `f.patched` is the same.

    The block may be kept and entered any number of times, by several threads at once too. At its end a
    `NotRecordedWarning` tells which patterns named nothing that the block's runs computed.

    Args:
        f: The `Florence2` whose runs are patched.
        patches: Names or patterns (see `florence2.tracing.names`), each with a patch: a tensor, a function of a tensor,
            or a `Patch` made by `florence2.inspect.patches`. Where two patterns match one name, both patches act, in
            the order of the mapping.
        unknown: "allow" also accepts names that the table does not have, such as those that modules of your own record.

    Returns:
        A context manager.

    Raises:
        OptionError: A name does not exist or cannot be patched; within the block, a patch has the wrong shape.
    """
    return PatchBlock(f, patches, unknown)


class PatchBlock(TraceBlock):
    """The block of `patched`. It holds no state of its own, so that threads can share it."""

    def __init__(self, f: Traceable, patches: Mapping[str, PatchLike], unknown: Unknown = "refuse"):
        super().__init__(f, self._start_call, patches=True)
        if not isinstance(patches, Mapping):
            raise OptionError(
                f"Patches are {str(patches)[:60]!r}; give a mapping from names, as {{'memory': patches.zero()}}."
            )
        known = {name.name: name for name in names_of(f.model.config) if not name.searched}
        self.selected = select(patches, list(known.values()), exactly=True, unknown=unknown)
        self.open = OpenPatterns(self.selected if unknown == "allow" else (), known, exactly=True)
        self.made = {pattern: as_patch(pattern, patches[pattern]) for pattern in self.selected}
        self.chosen = _by_name(known, self.selected, self.made)

    def __enter__(self) -> None:
        """Put the patches in force."""
        super().__enter__()
        _entries.set((*_entries.get(), _Entry(self)))

    def __exit__(self, error: object = None, *_: object) -> None:
        """End the patches; unless an exception left the block, warn about names that did not occur."""
        super().__exit__(error, *_)
        entries = _entries.get()
        last = max(i for i, entry in enumerate(entries) if entry.block is self)
        _entries.set(entries[:last] + entries[last + 1 :])
        if error is None and entries[last].calls:
            recorded = entries[last].recorded
            warn_not_recorded("patch", self.open.complete(self.selected, recorded), recorded, stacklevel=2)

    def _start_call(self) -> "_Patching":
        return _Patching(self, [entry for entry in _entries.get() if entry.block is self])


@dataclass
class _Entry:
    """One time that a block was entered: how many calls it has patched, and which names they computed."""

    block: PatchBlock
    calls: int = 0
    recorded: set[str] = field(default_factory=set)


_entries: ContextVar[tuple[_Entry, ...]] = ContextVar("florence2_patch_entries", default=())


def _by_name(
    known: Mapping[str, Name], selected: Mapping[str, Sequence[str]], made: Mapping[str, Patch]
) -> dict[str, tuple[Name, list[Patch]]]:
    """Return the patches of every single name, in the order of the mapping."""
    chosen: dict[str, tuple[Name, list[Patch]]] = {}
    for pattern, names in selected.items():
        for name in names:
            chosen.setdefault(name, (known[name], []))[1].append(made[pattern])
    return chosen


def as_patch(pattern: str, patch: PatchLike) -> Patch:
    """Turn any value of a mapping of patches into a Patch."""
    if isinstance(patch, Patch):
        return patch
    if isinstance(patch, Tensor):
        return replace(patch)
    if callable(patch):
        function = patch  # given a copy, so that writing into it changes neither encoded images nor other traces
        return Patch(lambda value, name, step: function(value.clone()), "a function")  # noqa: ARG005
    raise OptionError(
        f"The patch of {pattern} is {str(patch)[:60]!r}; it must be a tensor, a function of one, or a Patch such as "
        "patches.zero()."
    )


class _Patching(Trace):
    """The patches of one call: counts the steps."""

    def __init__(self, block: PatchBlock, entries: Sequence[_Entry]):
        self.block, self.entries = block, entries
        self.seen: dict[str, int] = {}
        self._entered = prefixes(block.chosen)
        self._counted, self._in_image, self._sizes = False, False, CallSizes(1)

    def wants(self, name: str) -> bool:
        return name in self.block.chosen or bool(self.block.open.matching(name))

    def enters(self, prefix: str) -> bool:
        return prefix in self._entered or self.block.open.enters(prefix)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if not self._counted:  # every call shows something, be it only the logits
            self._counted = True
            for entry in self.entries:
                entry.calls += 1
        if not self.wants(name):
            return value
        for entry in self.entries:
            entry.recorded.add(name)
        known, patches = self.block.chosen.get(name) or self._unlisted(name, value)
        step = self.seen[name] = self.seen.get(name, -1) + 1
        for patch in patches:
            value = fit(patch.function(value, known, step), value, known)
        return value

    def _unlisted(self, name: str, value: Tensor) -> tuple[Name, list[Patch]]:
        """Return the entry and the patches of a value that the table does not have."""
        when: When = "image" if self._in_image else "prompt" if name.startswith("encoder.") else "step"
        patterns = self.block.open.matching(name)
        return name_value(name, value, when, self._sizes), [self.block.made[pattern] for pattern in patterns]

    def image_started(self, shape: Sequence[int]) -> None:
        """Note the size of the batch, which shows what the dimensions of an unlisted value are."""
        self._in_image, self._sizes = True, CallSizes(shape[0])

    def answer_started(
        self, images: Sequence[EncodedImage], prompts: Sequence[Sequence[int]], options: GenerationOptions
    ) -> None:
        """Note the sizes of the batch."""
        positions = images[0].features.shape[1] + max(map(len, prompts))
        self._sizes = CallSizes(len(prompts), options.width, positions)


def zero() -> Patch:
    """Replace a value by zeros.

    Returns:
        The patch.
    """
    return Patch(lambda value, name, step: torch.zeros_like(value), "zero()")  # noqa: ARG005


def scale(factor: float) -> Patch:
    """Multiply a value by a number.

    Args:
        factor: The number.

    Returns:
        The patch.

    Raises:
        OptionError: `factor` is not a number.
    """
    if not isinstance(factor, Real):
        raise OptionError(f"The factor of scale is {str(factor)[:60]!r}; it must be a number.")
    return Patch(lambda value, name, step: value * factor, f"scale({factor})")  # noqa: ARG005


def replace(new: Tensor) -> Patch:
    """Replace a value by a tensor.

    Args:
        new: A tensor of the shape of the value, or of that shape without B, which is then used for every request.

    Returns:
        The patch.

    Raises:
        OptionError: `new` is not a tensor.
    """
    if not isinstance(new, Tensor):
        raise OptionError(f"replace takes a tensor, not {type(new).__name__}; make one with torch.as_tensor.")
    return Patch(lambda value, name, step: new, f"replace({tuple(new.shape)})")  # noqa: ARG005


def zero_heads(heads: Collection[int]) -> Patch:
    """Set some heads or groups to zero.

    Args:
        heads: Their numbers, from 0. The name must have heads or groups, such as `...cross_attention.heads`.

    Returns:
        The patch.

    Raises:
        OptionError: `heads` are not whole numbers; when the value is computed, it has no heads or not so many.
    """
    return at(zero(), heads=heads)


def scale_heads(heads: Collection[int], factor: float) -> Patch:
    """Multiply some heads or groups by a number; see `zero_heads` and `scale`.

    Args:
        heads: Their numbers, from 0.
        factor: The number.

    Returns:
        The patch.

    Raises:
        OptionError: As in `zero_heads` and `scale`.
    """
    return at(scale(factor), heads=heads)


def from_run(source: Run | TracedImage | Tracing) -> Patch:
    """Replace a value by that of another run, at the same name and step; steps that it lacks stay as they are.

    Args:
        source: A run or image of a trace, or a trace that holds only one. The trace must have kept the name. Values
            must have the same shape: the same number of beams and, where positions of the memory count, prompts of the
            same length.

    Returns:
        The patch.

    Raises:
        OptionError: `source` is none of these; when the value is computed, the trace does not hold it.
    """
    if not isinstance(source, Run | TracedImage | Tracing):
        raise OptionError(f"from_run takes a trace, or one of its runs or images, not {type(source).__name__}.")
    return Patch(partial(_take_from, source), "from_run(...)")


def _take_from(source: Run | TracedImage | Tracing, value: Tensor, name: Name, step: int) -> Tensor:
    if isinstance(source, Tracing):
        only_image = name.when == "image" and len(source.images) == 1
        source = source.images[0] if only_image else source.run
    if isinstance(source, Run) and name.when == "image":
        source = source.image
    steps = source.batched(name.name)
    if step >= len(steps):
        return value
    new, of_batch = steps[step], name.shape[:1] == ("B",)
    if of_batch or new.shape == value.shape:
        return new[0] if of_batch else new
    copies = value.shape[0] // new.shape[0]
    return new.repeat(copies, *[1] * (new.dim() - 1)) if copies * new.shape[0] == value.shape[0] else new


def at(
    patch: PatchLike,
    *,
    steps: Collection[int] | None = None,
    positions: Sequence[int] | slice | None = None,
    heads: Collection[int] | None = None,
) -> Patch:
    """Confine another patch to some steps, positions and heads.

    The other patch is computed on the whole value and kept only where all given conditions hold.

    Args:
        patch: The other patch.
        steps: Steps of the answer, from 0; all by default.
        positions: Positions of the value's sequence, from 0: of the memory (S), the image tokens (N), the prompt (P) or
            the grid (h x w, counted row by row). For attention weights, and for keys and values of the memory, the
            positions attended to. All by default.
        heads: Heads or groups, from 0; all by default.

    Returns:
        The patch.

    Raises:
        OptionError: The numbers are not whole numbers from 0; when the value is computed, it has no such dimension, or
            not so many entries in it.
    """
    inner = as_patch("at(...)", patch)
    given = {"steps": steps, "positions": positions, "heads": heads}
    for key, numbers in given.items():
        check_numbers(key, numbers)
    description = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)

    def confined(value: Tensor, name: Name, step: int) -> Tensor:
        if steps is not None and step not in steps:
            return value
        new = fit(inner.function(value, name, step), value, name)
        chosen = torch.ones(value.shape, dtype=torch.bool, device=value.device)
        if heads is not None:
            chosen &= mask(value, [head_dim(name)], list(heads), name, "head")
        if positions is not None:
            chosen &= mask(value, position_dims(name), positions, name, "position")
        return torch.where(chosen, new, value)

    return Patch(confined, f"at({inner!r}, {description})")
