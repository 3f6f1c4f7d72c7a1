"""Weights in oneDNN's blocked order for the few rows of a decoder's step, where that is faster.

A step multiplies a row a beam with every weight of the decoder, so its time is that of reading them: 356 MB for base in
float32. Which product reads faster depends on the processor and the number of rows: with three beams an AMD EPYC (Zen
5) reads blocked weights three times as fast as plain ones, an Intel Xeon (Sapphire Rapids) plain ones up to a quarter
faster, and from eight rows on blocked ones. So both are timed once for each shape, and only what gains is packed.

Packed copies are used inside the steps of one generation alone, and only after its start has compared each weight with
its copy's fingerprint: modules are called as always, so hooks, patches, traces and replaced parts need no exception.
"""

import contextlib
import math
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PACKED_FOR = 8  # rows that oneDNN arranges the weights for; other numbers are almost as fast
_MAX_ROWS = 64  # with more rows a step computes more than it reads, and `fast.linear` chooses the product
_SAMPLE_BYTES = 24 << 20  # of each shape: enough to leave the caches of one core
_MARGIN = 1.05  # what a packed copy must gain, for it takes memory
_ROUNDS = 3


class PackedWeight:
    """A weight (out, in) in oneDNN's order, as it was when this was made."""

    def __init__(self, weight: Tensor):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _PACKED_FOR)
        self.fingerprint = Fingerprint.of(weight)
        self.weight = weakref.ref(weight)
        self.version = _version(weight)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x (..., in) -> (..., out)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "none")
        return out

    def is_of(self, weight: Tensor) -> bool:
        """Return whether this is a copy of this very tensor, unchanged as far as torch counts changes."""
        return self.weight() is weight and _version(weight) == self.version


def _version(weight: Tensor) -> int:
    """Return how often torch saw the tensor written to; it does not count for tensors made in inference mode."""
    return 0 if weight.is_inference() else weight._version


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Numbers that change with the values of a weight, whoever changed them and how, `weight.data` included.

    `total` sums the bits as integers: any single change shows. `rows` (out,) multiplies every row with fixed random
    numbers: exchanged rows, columns, heads or elements show. Both read the weight once, at the speed of the memory.
    """

    place: int
    total: int
    rows: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Fingerprint":
        """Take the fingerprint of a float32 weight (out, in)."""
        values = weight.detach().contiguous()
        pairs = values.numel() % 2 == 0 and values.storage_offset() % 2 == 0
        total = int(values.view(-1).view(torch.int64 if pairs else torch.int32).sum())
        return cls(weight.data_ptr(), total, torch.mv(values, _random_numbers(values.shape[1])))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint) or (self.place, self.total) != (other.place, other.total):
            return False
        return torch.equal(self.rows.view(torch.int32), other.rows.view(torch.int32))  # as bits, so that NaN is NaN

    __hash__ = None  # type: ignore[assignment]


@cache
def _random_numbers(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


PackedWeights = Mapping[int, PackedWeight]
"""Packed copies by the `id` of the weight."""

_in_force: ContextVar[PackedWeights | None] = ContextVar("florence2_packed_weights", default=None)


@contextlib.contextmanager
def in_force(packed: PackedWeights) -> Iterator[None]:
    """Let `fast.linear` use these copies inside the block, in this thread or task."""
    token = _in_force.set(packed)
    try:
        yield
    finally:
        _in_force.reset(token)


def find_packed(weight: Tensor) -> PackedWeight | None:
    """Return the copy of `weight` that is in force."""
    packed = _in_force.get()
    found = None if packed is None else packed.get(id(weight))
    return found if found is not None and found.is_of(weight) else None


_lock = Lock()
_kept: "weakref.WeakKeyDictionary[nn.Module, dict[int, PackedWeight]]" = weakref.WeakKeyDictionary()
"""The packed copies of each model, for as long as it lives and they are current."""
_gains: dict[tuple[int, ...], bool] = {}
"""Whether packing gains, by (threads, rows, out, in)."""


def pack(owner: nn.Module, weights: Iterable[Tensor], rows: int) -> PackedWeights:
    """Return current packed copies of those of `weights` that `rows` rows are multiplied faster with.

    Copies are kept as long as `owner` lives, and made again for a weight that has changed. Nothing is packed where
    oneDNN is missing or wrong, or the weights are not float32 on a CPU.
    """
    if why_none(rows) is not None:
        return {}
    usable = [weight for weight in weights if why_unusable(weight) is None]
    with _lock, torch.no_grad():
        known, wanted = _kept.get(owner, {}), find_gaining(usable, rows)
        packed = {id(weight): _current(known.get(id(weight)), weight) for weight in wanted}
        if packed:  # copies for other numbers of rows stay, those of weights that are gone do not
            _kept[owner] = {key: copy for key, copy in known.items() if copy.weight() is not None} | packed
        return packed


def why_none(rows: int) -> str | None:
    """Return in words why no weight is packed for so many rows; None where packing is possible."""
    if rows > _MAX_ROWS:
        return f"a step has {rows} rows, and packing gains up to {_MAX_ROWS}"
    return None if is_available() else "oneDNN's packed products are missing or wrong on this machine"


def why_unusable(weight: Tensor) -> str | None:
    """Return in words why a weight cannot be packed; None if it can."""
    if weight.device.type != "cpu":
        return f"on {weight.device.type}"
    if weight.dtype != torch.float32:
        return f"{str(weight.dtype).removeprefix('torch.')}, not float32"
    return None if weight.dim() == 2 else "not a matrix"


def find_gaining(weights: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Return the weights that `rows` rows are multiplied faster with when they are packed; measured once a process."""
    gains = _gains_by_shape(weights, rows)
    return [weight for weight in weights if gains[tuple(weight.shape)]]


def _current(known: PackedWeight | None, weight: Tensor) -> PackedWeight:
    if known is not None and known.weight() is weight and known.fingerprint == Fingerprint.of(weight):
        known.version = _version(weight)  # changed and changed back, or written with the same values
        return known
    return PackedWeight(weight)


def _gains_by_shape(weights: Sequence[Tensor], rows: int) -> dict[tuple[int, ...], bool]:
    """Return for every shape of `weights` whether packing gains; measured once a process."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for weight in weights:
        by_shape[tuple(weight.shape)].append(weight)
    bucket = 1 << (rows - 1).bit_length()
    gains = {}
    for shape, some in by_shape.items():
        key = (torch.get_num_threads(), bucket, *shape)
        if key not in _gains:
            _gains[key] = _measure_gain(some, rows) > _MARGIN
        gains[shape] = _gains[key]
    return gains


def _measure_gain(weights: Sequence[Tensor], rows: int) -> float:
    """Return how many times as fast packed products of some of `weights`, all of one shape, are as plain ones."""
    out, inner = weights[0].shape
    part = weights[0].detach()[: math.ceil(_SAMPLE_BYTES / (4 * inner))]  # of a large one, such as the embedding
    some = [part] if len(part) < out else [w.detach() for w in weights[: math.ceil(_SAMPLE_BYTES / (4 * out * inner))]]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR) for weight in some]
    x = torch.ones(rows, inner)
    plain_times, packed_times = [], []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for weight in some:
            F.linear(x, weight)
        between = time.perf_counter()
        for copy in packed:
            torch.ops.mkldnn._linear_pointwise(x, copy, None, "none", [], "none")
        plain_times.append(between - started)
        packed_times.append(time.perf_counter() - between)
    return min(plain_times) / min(packed_times)


def is_available() -> bool:
    """Return whether oneDNN's packed products exist here and are right."""
    needed = ("_reorder_linear_weight", "_linear_pointwise")
    known = torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in needed)
    return known and _is_right(torch.get_num_threads())


@cache
def _is_right(threads: int) -> bool:  # noqa: ARG001
    """Return whether a packed product is that of `F.linear`, with so many threads.

    Where OpenMP gives fewer threads than torch counts on, as under OMP_THREAD_LIMIT, oneDNN (3.12, of torch 2.13)
    leaves a part of the product undone and says nothing.
    """
    with torch.inference_mode():
        x, weight = torch.linspace(-1, 1, 2048).view(8, 256), torch.linspace(-1, 1, 512 * 256).view(512, 256)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
        product = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "none")
        return torch.allclose(product, F.linear(x, weight), atol=1e-3)
