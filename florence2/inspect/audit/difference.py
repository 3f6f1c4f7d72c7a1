"""Compare two checkpoints tensor by tensor and layer by layer: what differs, and by how much.

Tensors are matched by canonical names, so that checkpoints of different layouts and types can be compared. Only tensors
that are not equal bit for bit are read a second time, one pair at a time.
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
from florence2.inspect.audit.change import TensorChange, measure_change, no_change, sum_changes
from florence2.inspect.audit.checkpoint import (
    Audit,
    TensorAudit,
    audit,
    group_by_layer,
    is_absent_zero,
    is_weight,
    to_plain,
)
from florence2.inspect.audit.measures import Spectrum, as_matrix, measure_spectrum
from florence2.inspect.progress import ProgressCallback, ignore_progress
from florence2.model.config import Florence2Config

ProgressOf = Callable[[str], ProgressCallback]
"""Called with the name of a piece of work; returns the callback for its progress."""
_TABLE = re.compile(r".*\b(shared|embed_positions|row_embeddings|column_embeddings)\.weight|final_logits_bias")


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that both checkpoints have.

    `compared` is the shape that was compared: for tables, which may differ in length, the common rows. `spectrum` is
    that of A - B, for weights that changed and are finite.
    """

    name: str
    compared: tuple[int, ...]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    parameters: int
    change: TensorChange
    spectrum: Spectrum | None

    @property
    def identical(self) -> bool:
        """Whether all compared values are equal."""
        return not self.change.changed


@dataclass(frozen=True)
class LayerDifference:
    """One layer, block or table: its tensors that both checkpoints have, taken as one."""

    name: str
    tensors: int
    identical: int
    parameters: int
    change: TensorChange
    rank_99: int | None
    """The largest `rank_99` of the changes of its maps."""


@dataclass(frozen=True)
class ConfigChange:
    """A field of the configuration with the value `a` in the first checkpoint and `b` in the second."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Difference:
    """The comparison of two checkpoints; `a` and `b` are their audits, without spectra."""

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
        """The number of tensors with equal values."""
        return sum(tensor.identical for tensor in self.tensors)

    @property
    def same(self) -> bool:
        """Whether both hold the same weights, possibly in different types or layouts."""
        cut = any(tensor.shapes[0] != tensor.shapes[1] for tensor in self.tensors)
        return self.identical == len(self.tensors) and not (self.only_a or self.only_b or self.misfits or cut)

    def most_changed(self, count: int) -> list[TensorDifference]:
        """Return the tensors with the largest relative change; those that were zero before come first."""
        changed = [tensor for tensor in self.tensors if not tensor.identical]
        return sorted(
            changed, key=lambda t: math.inf if t.change.relative is None else t.change.relative, reverse=True
        )[:count]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe values: both audits and all differences."""
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
    """Audit two checkpoints and compare them.

    Args:
        first: The first checkpoint, A: a folder, a weight file, or an index of shards.
        second: The second checkpoint, B.
        spectra: Also compute the singular values of every change.
        allow_pickle: Read a .bin file where no safetensors exist.
        progress: Called with the name of each piece of work; returns the callback for its progress.

    Returns:
        The comparison; tensors of different sizes are reported in it.

    Raises:
        CheckpointError: As in `audit`.
    """
    progress_of = progress or (lambda _work: ignore_progress)
    a, b = (
        audit(path, spectra=False, allow_pickle=allow_pickle, progress=progress_of(f"tensors of {path}"))
        for path in (first, second)
    )
    by_name_a, by_name_b = ({tensor.name: tensor for tensor in found.tensors} for found in (a, b))
    common = [(by_name_a[name], by_name_b[name]) for name in by_name_a if name in by_name_b]
    fitting = [pair for pair in common if _common_shape(*pair) is not None]
    different = [pair for pair in fitting if pair[0].sha256 != pair[1].sha256]
    report, measured = progress_of("pairs of tensors that differ"), {}
    report(0, len(different))
    read = _read(first, second, different, allow_pickle)
    for done, ((x, y), values) in enumerate(zip(different, read, strict=True), 1):
        measured[x.name] = _measure(x, y, *values, spectra)
        report(done, len(different))
    tensors = tuple(measured.get(x.name) or _describe(x, y, no_change(x.values)) for x, y in fitting)
    return Difference(
        a=a,
        b=b,
        config=compare_configs(a.config, b.config),
        only_a=tuple(t.name for t in a.tensors if t.name not in by_name_b and not is_absent_zero(t)),
        only_b=tuple(t.name for t in b.tensors if t.name not in by_name_a and not is_absent_zero(t)),
        misfits=tuple(x.name for x, y in common if _common_shape(x, y) is None),
        layers=tuple(_sum_up(name, group) for name, group in group_by_layer(tensors).items()),
        tensors=tensors,
    )


def compare_configs(a: Florence2Config | None, b: Florence2Config | None) -> tuple[ConfigChange, ...]:
    """Return the fields that differ, by their paths; none when either configuration could not be read."""
    if a is None or b is None:
        return ()
    first, second = _flatten(asdict(a)), _flatten(asdict(b))
    fields = [field for field in {**first, **second} if first.get(field) != second.get(field)]
    return tuple(ConfigChange(field, first.get(field), second.get(field)) for field in fields)


def _flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def _read(
    first: Path, second: Path, pairs: Sequence[tuple[TensorAudit, TensorAudit]], allow_pickle: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors of each pair, cut to their common shape."""
    sources = (
        read_stored(find_weights(path, allow_pickle), [pair[side].stored[0] for pair in pairs])
        for side, path in enumerate((first, second))
    )
    for pair, a, b in zip(pairs, *sources, strict=True):
        inside = tuple(slice(size) for size in _common_shape(*pair) or ())
        yield a[inside], b[inside]


def _common_shape(a: TensorAudit, b: TensorAudit) -> tuple[int, ...] | None:
    """Return the shape in which two tensors can be compared (tables: the shorter length), or None."""
    if a.shape == b.shape:
        return a.shape
    axis = 1 if a.name == "final_logits_bias" else 0
    if not _TABLE.fullmatch(a.name) or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1 - axis] != b.shape[1 - axis]:
        return None
    return tuple(map(min, a.shape, b.shape))


def _measure(a: TensorAudit, b: TensorAudit, values_a: Tensor, values_b: Tensor, spectra: bool) -> TensorDifference:
    x, y = as_matrix(values_a), as_matrix(values_b)
    change = measure_change(x, y)
    wanted = spectra and is_weight(a.name) and not change.non_finite and change.changed > 0
    return _describe(a, b, change, measure_spectrum(x, minus=y) if wanted else None)


def _describe(
    a: TensorAudit, b: TensorAudit, change: TensorChange, spectrum: Spectrum | None = None
) -> TensorDifference:
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
