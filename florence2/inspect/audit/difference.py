"""What differs between two checkpoints, and by how much, tensor by tensor and layer by layer.

Tensors are matched by their clean names, so that a checkpoint can be compared with one in the other layout or of
another type. Only what is not equal bit for bit is read a second time, one pair of tensors at a time.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from florence2.checkpoints.describe import read_stored
from florence2.checkpoints.tensors import find_weights
from florence2.inspect.audit.change import Change, measure_change, no_change, sum_changes
from florence2.inspect.audit.checkpoint import (
    Audit,
    Progress,
    TensorAudit,
    audit,
    group_by_layer,
    is_absent_zero,
    is_weight,
    to_plain,
)
from florence2.inspect.audit.measures import Spectrum, as_matrix, measure_spectrum
from florence2.model.config import Florence2Config

ProgressOf = Callable[[str], Progress]
"""The name of a piece of work -> who is to be told how far it is."""
_TABLE = re.compile(r".*\b(shared|embed_positions|row_embeddings|column_embeddings)\.weight|final_logits_bias")


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that both have. `compared` is the shape of what was compared: of tables, which may differ in length,
    the common rows. `spectrum` is that of A - B, for weights that changed and are finite."""

    name: str
    compared: tuple[int, ...]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    parameters: int
    change: Change
    spectrum: Spectrum | None

    @property
    def identical(self) -> bool:
        """Whether all values that were compared are equal."""
        return not self.change.changed


@dataclass(frozen=True)
class LayerDifference:
    """One layer, block or table: the tensors of it that both have, taken as one."""

    name: str
    tensors: int
    identical: int
    parameters: int
    change: Change
    rank_99: int | None
    """The largest `rank_99` of the changes of its maps."""


@dataclass(frozen=True)
class ConfigChange:
    """A field of the configuration that says `a` in the first and `b` in the second."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Difference:
    """Two checkpoints compared; `a` and `b` are their audits, without spectra."""

    a: Audit
    b: Audit
    config: tuple[ConfigChange, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    misfits: tuple[str, ...]
    """Tensors whose shapes do not allow a comparison."""
    layers: tuple[LayerDifference, ...]
    tensors: tuple[TensorDifference, ...]

    @property
    def identical(self) -> int:
        """How many tensors have equal values."""
        return sum(tensor.identical for tensor in self.tensors)

    @property
    def same(self) -> bool:
        """Whether the two hold the same weights, perhaps in another type or layout."""
        cut = any(tensor.shapes[0] != tensor.shapes[1] for tensor in self.tensors)
        return self.identical == len(self.tensors) and not (self.only_a or self.only_b or self.misfits or cut)

    def most_changed(self, count: int) -> list[TensorDifference]:
        """The tensors with the largest relative change; those that were zero before come first."""
        changed = [tensor for tensor in self.tensors if not tensor.identical]
        return sorted(
            changed, key=lambda t: math.inf if t.change.relative is None else t.change.relative, reverse=True
        )[:count]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the two audits and all that differs."""
        values: dict[str, Any] = to_plain(asdict(self))
        return values | {"a": self.a.to_dict(), "b": self.b.to_dict(), "identical": self.identical, "same": self.same}


def compare_checkpoints(
    first: Path,
    second: Path,
    *,
    spectra: bool = True,
    allow_pickle: bool = False,
    progress: ProgressOf | None = None,
) -> Difference:
    """Audit two checkpoints and compare them. Raises as `audit` does; different sizes are no error but reported."""
    told = progress or _untold
    a, b = (
        audit(path, spectra=False, allow_pickle=allow_pickle, progress=told(f"tensors of {path}"))
        for path in (first, second)
    )
    ours, theirs = ({tensor.name: tensor for tensor in found.tensors} for found in (a, b))
    common = [(ours[name], theirs[name]) for name in ours if name in theirs]
    fitting = [pair for pair in common if _common_shape(*pair) is not None]
    different = [pair for pair in fitting if pair[0].sha256 != pair[1].sha256]
    tell, measured = told("pairs of tensors that differ"), {}
    tell(0, len(different))
    read = _read(first, second, different, allow_pickle)
    for done, ((x, y), values) in enumerate(zip(different, read, strict=True), 1):
        measured[x.name] = _measure(x, y, *values, spectra)
        tell(done, len(different))
    tensors = tuple(measured.get(x.name) or _describe(x, y, no_change(x.values)) for x, y in fitting)
    return Difference(
        a=a,
        b=b,
        config=compare_configs(a.config, b.config),
        only_a=tuple(t.name for t in a.tensors if t.name not in theirs and not is_absent_zero(t)),
        only_b=tuple(t.name for t in b.tensors if t.name not in ours and not is_absent_zero(t)),
        misfits=tuple(x.name for x, y in common if _common_shape(x, y) is None),
        layers=tuple(_sum_up(name, group) for name, group in group_by_layer(tensors).items()),
        tensors=tensors,
    )


def compare_configs(a: Florence2Config | None, b: Florence2Config | None) -> tuple[ConfigChange, ...]:
    """The fields that differ, by their paths; none where one of the two could not be read."""
    if a is None or b is None:
        return ()
    ours, theirs = _flatten(asdict(a)), _flatten(asdict(b))
    fields = [field for field in {**ours, **theirs} if ours.get(field) != theirs.get(field)]
    return tuple(ConfigChange(field, ours.get(field), theirs.get(field)) for field in fields)


def _flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def _untold(_: str) -> Progress:
    return lambda _done, _total: None


def _read(
    first: Path, second: Path, pairs: Sequence[tuple[TensorAudit, TensorAudit]], allow_pickle: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of each pair, cut to what is common."""
    sources = (
        read_stored(find_weights(path, allow_pickle), [pair[side].stored[0] for pair in pairs])
        for side, path in enumerate((first, second))
    )
    for pair, a, b in zip(pairs, *sources, strict=True):
        inside = tuple(slice(size) for size in _common_shape(*pair) or ())
        yield a[inside], b[inside]


def _common_shape(a: TensorAudit, b: TensorAudit) -> tuple[int, ...] | None:
    """The shape that two tensors can be compared in: of tables the shorter length; None when there is none."""
    if a.shape == b.shape:
        return a.shape
    axis = 1 if a.name == "final_logits_bias" else 0
    if not _TABLE.fullmatch(a.name) or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1 - axis] != b.shape[1 - axis]:
        return None
    return tuple(map(min, a.shape, b.shape))


def _measure(a: TensorAudit, b: TensorAudit, ours: Tensor, theirs: Tensor, spectra: bool) -> TensorDifference:
    x, y = as_matrix(ours), as_matrix(theirs)
    change = measure_change(x, y)
    wanted = spectra and is_weight(a.name) and not change.non_finite and change.changed > 0
    return _describe(a, b, change, measure_spectrum(x, minus=y) if wanted else None)


def _describe(a: TensorAudit, b: TensorAudit, change: Change, spectrum: Spectrum | None = None) -> TensorDifference:
    shape = _common_shape(a, b)
    assert shape is not None
    return TensorDifference(a.name, shape, (a.shape, b.shape), (a.dtype, b.dtype), math.prod(shape), change, spectrum)


def _sum_up(name: str, tensors: Sequence[TensorDifference]) -> LayerDifference:
    return LayerDifference(
        name=name,
        tensors=len(tensors),
        identical=sum(tensor.identical for tensor in tensors),
        parameters=sum(tensor.parameters for tensor in tensors),
        change=sum_changes(tensor.change for tensor in tensors),
        rank_99=max((tensor.spectrum.rank_99 for tensor in tensors if tensor.spectrum), default=None),
    )
