"""Measure one tensor, in parts in float64: values, spectrum, dead units, hash.

A tensor is treated as the matrix (out, everything else): a kernel (out, in, k, k) as (out, in * k * k).
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEAD = 1e-3
"""A unit is dead when its norm is at most this share of the median norm of the tensor's units that are not zero."""
MAX_SIDE = 8192  # limit of the smaller side for a spectrum, whose cost grows with its cube; published models have 2,048
_PART = 1 << 20  # values converted to float64 at once, 8 MB


@dataclass(frozen=True)
class Values:
    """Statistics of the values of a tensor; all but `nan` and `infinite` cover the finite values.

    `norm` is the Frobenius norm; `std` divides by the number of values; mean and extremes are None without finite
    values.
    """

    norm: float
    mean: float | None
    std: float | None
    minimum: float | None
    maximum: float | None
    zeros: int
    nan: int
    infinite: int


@dataclass(frozen=True)
class Spectrum:
    """A summary of the singular values s of a matrix; `side` is their number, the smaller side of the matrix.

    `stable_rank` is sum(s²) / max(s)²; `effective_rank` the exponential of the entropy of s / sum(s) (Roy and
    Vetterli, EUSIPCO 2007); `rank_99` the number of the largest ones that hold 99 % of sum(s²). All are 0 for a matrix
    of zeros. They come from the eigenvalues of the smaller Gram matrix, so values below 1e-8 of the largest are noise.
    """

    side: int
    largest: float
    stable_rank: float
    effective_rank: float
    rank_99: int


@dataclass(frozen=True)
class Units:
    """The number of dead units, and the indices of the first few."""

    count: int
    first: tuple[int, ...]


NO_UNITS = Units(0, ())


def as_matrix(tensor: Tensor) -> Tensor:
    """View a tensor (out, ...) as a matrix (out, everything else); a vector becomes a column."""
    if tensor.numel() == 0:
        return tensor.new_zeros(0, 1)
    return tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)


def measure_values(matrix: Tensor) -> Values:
    """Measure all values, in two passes: the standard deviation needs the mean."""
    low, high, total, squares = math.inf, -math.inf, 0.0, 0.0
    count = zeros = nan = 0
    for part in in_parts(matrix):
        finite = keep_finite(part)  # (n,)
        nan += int(part.isnan().sum())
        if finite.numel():
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        count, zeros = count + finite.numel(), zeros + int((finite == 0).sum())
        total, squares = total + float(finite.sum()), squares + float(finite.square().sum())
    infinite = matrix.numel() - count - nan
    if not count:
        return Values(0.0, None, None, None, None, 0, nan, infinite)
    mean = total / count
    spread = sum(float((keep_finite(part) - mean).square().sum()) for part in in_parts(matrix))
    return Values(math.sqrt(squares), mean, math.sqrt(spread / count), low, high, zeros, nan, infinite)


def measure_spectrum(matrix: Tensor, minus: Tensor | None = None) -> Spectrum | None:
    """Return the spectrum of a matrix of finite values, or of `matrix - minus`; None for vectors and huge matrices."""
    side = min(matrix.shape)
    if side < 2 or side > MAX_SIDE:
        return None
    wide = matrix.shape[0] < matrix.shape[1]
    gram = torch.zeros(side, side, dtype=torch.float64)
    tall = matrix.T if wide else matrix
    subtracted = None if minus is None else in_parts(minus.T if wide else minus)
    for part in in_parts(tall):
        rows = part if subtracted is None else part - next(subtracted)
        gram.addmm_(rows.T, rows)  # (side, side)
    return summarise(torch.linalg.eigvalsh(gram)) if gram.isfinite().all() else None


def summarise(squares: Tensor) -> Spectrum:
    """Summarise the ascending eigenvalues of a Gram matrix."""
    squares = squares.clamp(min=0).flip(0)
    largest, total = float(squares[0]), float(squares.sum())
    if not largest:
        return Spectrum(len(squares), 0.0, 0.0, 0.0, 0)
    shares = squares.sqrt() / squares.sqrt().sum()
    effective = math.exp(float(torch.special.entr(shares).sum()))
    within = int((squares.cumsum(0) < 0.99 * total).sum()) + 1
    return Spectrum(len(squares), math.sqrt(largest), total / largest, effective, within)


def find_dead(tensor: Tensor) -> tuple[Units, Units]:
    """Return the dead rows (outputs, tokens of a table, scales of a norm) and dead columns (inputs) of a weight.

    The columns of a kernel are its input channels; a single channel is not counted. Rows and columns with NaN or
    infinities are not judged.
    """
    matrix = as_matrix(tensor)
    rows: list[Tensor] = []
    columns = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for part in in_parts(matrix):
        squares = torch.where(part.isfinite(), part, torch.nan).square()
        rows.append(squares.sum(1))
        columns += squares.sum(0)
    if tensor.ndim < 2 or tensor.shape[1] < 2 or not rows:
        return _below(torch.cat(rows).sqrt() if rows else columns[:0]), NO_UNITS
    columns = columns.reshape(tensor.shape[1], -1).sum(1)
    return _below(torch.cat(rows).sqrt()), _below(columns.sqrt())


def keep_finite(part: Tensor) -> Tensor:
    """Return the finite values, (n,), without a copy when all are finite."""
    finite = part.isfinite()
    return part.flatten() if finite.all() else part[finite]


def in_parts(matrix: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a matrix in float64, as many at a time as fit into a part."""
    return (matrix[rows].double() for rows in _slices(matrix))


def _below(norms: Tensor, shown: int = 16) -> Units:
    alive = norms[norms > 0]
    limit = DEAD * float(alive.median()) if alive.numel() else 0.0
    indices = (norms <= limit).nonzero().flatten()
    return Units(len(indices), tuple(indices[:shown].tolist()))


def hash_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a line such as "float16 51289x768" and the bytes of the values in row-major order."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    digest = hashlib.sha256(f"{dtype} {'x'.join(map(str, tensor.shape))}\n".encode())
    matrix = as_matrix(tensor)
    for rows in _slices(matrix):
        digest.update(matrix[rows].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_all(hashes: Sequence[tuple[str, str]]) -> str:
    """Return the SHA-256 of the lines "HASH  NAME", sorted by name, for (name, hash) pairs."""
    return hashlib.sha256("".join(f"{value}  {name}\n" for name, value in sorted(hashes)).encode()).hexdigest()


def _slices(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = max(1, _PART // columns)
    return (slice(start, start + step) for start in range(0, rows, step))
