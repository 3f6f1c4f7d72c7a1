"""Measure the change from one tensor to another of its shape, computed in parts in float64."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from florence2.inspect.audit.measures import Values, in_parts


@dataclass(frozen=True)
class TensorChange:
    """The change from a tensor A to a tensor B.

    `norms` are the Frobenius norms of A and B; `distance` is that of A - B. `relative` is |A - B| / |A|, None if A is
    zero and B is not; `cosine` is None if either is zero; `maximum` is the largest |a - b|. `changed` counts the values
    that differ, where NaN equals NaN. Everything except the counts covers the positions where both are finite;
    `non_finite` counts the rest.
    """

    norms: tuple[float, float]
    distance: float
    relative: float | None
    cosine: float | None
    maximum: float
    changed: int
    non_finite: int


def measure_change(a: Tensor, b: Tensor) -> TensorChange:
    """Compare two matrices of one shape."""
    squares_a = squares_b = squares = dot = maximum = 0.0
    changed = non_finite = 0
    for x, y in zip(in_parts(a), in_parts(b), strict=True):
        changed += int(((x != y) & ~(x.isnan() & y.isnan())).sum())
        finite = x.isfinite() & y.isfinite()
        non_finite += int((~finite).sum())
        x, y = x[finite], y[finite]  # (n,)
        if not x.numel():
            continue
        squares_a, squares_b = squares_a + float(x @ x), squares_b + float(y @ y)
        dot += float(x @ y)
        x = x.sub_(y)
        squares, maximum = squares + float(x @ x), max(maximum, float(x.abs_().max()))
    return _describe(squares_a, squares_b, squares, dot, maximum, changed, non_finite)


def no_change(values: Values) -> TensorChange:
    """Return the change of a tensor that did not change."""
    squares = values.norm**2
    return _describe(squares, squares, 0.0, squares, 0.0, 0, values.nan + values.infinite)


def sum_changes(changes: Iterable[TensorChange]) -> TensorChange:
    """Combine the changes of several tensors into one."""
    changes = list(changes)
    return _describe(
        sum(change.norms[0] ** 2 for change in changes),
        sum(change.norms[1] ** 2 for change in changes),
        sum(change.distance**2 for change in changes),
        sum((change.cosine or 0.0) * change.norms[0] * change.norms[1] for change in changes),
        max((change.maximum for change in changes), default=0.0),
        sum(change.changed for change in changes),
        sum(change.non_finite for change in changes),
    )


def _describe(
    squares_a: float, squares_b: float, squares: float, dot: float, maximum: float, changed: int, non_finite: int
) -> TensorChange:
    a, b, distance = math.sqrt(squares_a), math.sqrt(squares_b), math.sqrt(squares)
    relative = distance / a if a else (None if distance else 0.0)
    cosine = min(1.0, max(-1.0, dot / (a * b))) if a and b else None
    return TensorChange((a, b), distance, relative, cosine, maximum, changed, non_finite)
