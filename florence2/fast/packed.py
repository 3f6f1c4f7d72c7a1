"""Weights in oneDNN's blocked order for the few rows of a decoder's step, where that is faster.

A step multiplies one row for each beam with every weight of the decoder, so it takes as long as reading them: 356 MB
for base in float32. Which product reads faster depends on the processor and the number of rows: with three beams an AMD
EPYC (Zen 5) reads blocked weights three times as fast as plain ones, an Intel Xeon (Sapphire Rapids) both equally fast;
from eight rows on, it reads blocked ones up to twice as fast. So both are timed once for each number of rows.

Packed copies are used inside the steps of one generation alone, and only after its start has compared each weight with
its copy's fingerprint: modules are called as always, so hooks, patches, traces and replaced parts need no exception.
Between two steps of one generation, changes that torch counts are seen at once; those written through `weight.data` or
NumPy are seen from the next generation on.
"""

import contextlib
import math
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PACKED_FOR = 8  # rows that oneDNN arranges the weights for; other numbers are almost as fast
_MAX_ROWS = 64  # with more rows a step computes more than it reads, and `fast.linear` chooses the product
_SAMPLE_BYTES = 24 << 20  # of one weight at most
_MARGIN = 1.1  # the least gain that is worth the memory of a second copy
_ROUNDS = 3


class PackedWeights:
    """Weights (out, in) that are multiplied with the same input, as one copy in oneDNN's order; often one alone."""

    def __init__(self, weights: Sequence[Tensor]):
        joined = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(joined.contiguous(), _PACKED_FOR)
        self.weights = [weakref.ref(weight) for weight in weights]
        self.places = [_place(weight) for weight in weights]
        self.versions = [weight._version for weight in weights]
        self.fingerprints = [Fingerprint.of(weight) for weight in weights]
        self.sizes = [len(weight) for weight in weights]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x (..., in) -> (..., sum of out)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "none")
        return out

    def holds(self, index: int, weight: Tensor) -> bool:
        """Return whether this is a copy of this very tensor, unchanged as far as torch counts changes."""
        same = self.weights[index]() is weight and weight._version == self.versions[index]
        return same and _place(weight) == self.places[index]

    def refresh(self, weights: Sequence[Tensor]) -> bool:
        """Return whether this is a copy of these very tensors and their values, however they were written to."""
        if len(weights) != len(self.weights) or any(
            own() is not w for own, w in zip(self.weights, weights, strict=True)
        ):
            return False
        if self.fingerprints != [Fingerprint.of(weight) for weight in weights]:
            return False
        self.places = [_place(weight) for weight in weights]
        self.versions = [weight._version for weight in weights]  # written with the same values
        return True


class Packed:
    """The packed copies that the steps of one generation use. A copy of it, such as in another process, is None."""

    def __init__(self, copies: Sequence[PackedWeights]):
        self.copies = copies
        self._places = {id(w()): (copy, i) for copy in copies for i, w in enumerate(copy.weights)}
        self._last: tuple[PackedWeights, Tensor, tuple[Tensor, ...]] | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return x (..., in) times `weight` (out, in); None for a weight without a current copy.

        The first weight of several computes the product of all, and the others take their part of it.
        """
        copy, index = self._places.get(id(weight), (None, 0))
        if copy is None or not copy.holds(index, weight):
            return None
        if len(copy.sizes) == 1:
            return copy(x, bias)
        if index == 0:
            self._last = copy, x, torch.split(copy(x, None), copy.sizes, dim=-1)
        if self._last is None or self._last[0] is not copy or self._last[1] is not x:
            return None
        part = self._last[2][index]
        return part if bias is None else part + bias


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is torch's own class, strided, and holds something."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.numel() > 0


def _place(weight: Tensor) -> tuple[object, ...]:
    return weight.data_ptr(), weight.shape, weight.stride()


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
    return torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


_in_force: ContextVar[Packed | None] = ContextVar("florence2_packed_weights", default=None)


@contextlib.contextmanager
def in_force(packed: Packed | None) -> Iterator[None]:
    """Let `fast.linear` use these copies inside the block, in this thread or task."""
    token = _in_force.set(packed)
    try:
        yield
    finally:
        _in_force.reset(token)


def is_any_packed() -> bool:
    """Return whether any copies are in force, in this thread or task."""
    return _in_force.get() is not None


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return the product with the copy of `weight` that is in force; None where there is none."""
    packed = _in_force.get()
    return None if packed is None else packed.product(x, weight, bias)


_lock = Lock()
_kept: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], PackedWeights]]" = weakref.WeakKeyDictionary()
"""The packed copies of each model by the ids of their weights, for as long as it lives and they are current."""
_gains: dict[tuple[object, ...], bool] = {}
"""Whether packing gains, by (threads, rows, how many groups have each shape)."""


def pack(owner: nn.Module, groups: Iterable[Sequence[Tensor]], rows: int) -> Packed | None:
    """Return current packed copies of the `groups` if packing makes products of `rows` rows faster.

    A group holds weights that are multiplied with the same input. Copies are kept as long as `owner` lives, and made
    again for weights that have changed. Nothing is packed where oneDNN is missing or wrong, or the weights are not
    float32 on a CPU.
    """
    if why_none(rows) is not None:
        return None
    usable = [tuple(group) for group in groups if why_unusable(group) is None]
    with _lock, torch.no_grad():
        if not gains(usable, rows):
            return None
        known = _kept.get(owner, {})
        packed = {_ids(group): _current(known.get(_ids(group)), group) for group in usable}
        alive = {ids: copy for ids, copy in known.items() if all(weight() is not None for weight in copy.weights)}
        _kept[owner] = alive | packed  # copies for other numbers of rows stay
        return Packed(list(packed.values()))


def why_none(rows: int) -> str | None:
    """Return in words why no weight is packed for so many rows; None where packing is possible."""
    if rows > _MAX_ROWS:
        return f"a step has {rows} rows, and packing gains up to {_MAX_ROWS}"
    return None if is_available() else "oneDNN's packed products are missing or wrong on this machine"


def why_unusable(group: Sequence[Tensor]) -> str | None:
    """Return in words why weights with a common input cannot be packed; None if they can."""
    for weight in group:
        if weight.device.type != "cpu":
            return f"on {weight.device.type}"
        if weight.dtype != torch.float32:
            return f"{str(weight.dtype).removeprefix('torch.')}, not float32"
        if weight.dim() != 2 or not is_plain(weight):
            return "not a plain matrix"
        if weight.is_inference():
            return "made in inference mode, where torch does not count changes"
    return None


def gains(groups: Sequence[Sequence[Tensor]], rows: int) -> bool:
    """Return whether a step of `rows` rows is faster with all `groups` packed; measured once a process."""
    counts = Counter(map(_joined_shape, groups))
    key = (torch.get_num_threads(), 1 << (rows - 1).bit_length(), frozenset(counts.items()))
    if key not in _gains:
        _gains[key] = bool(groups) and _measure_gain(groups, rows) > _MARGIN
    return _gains[key]


def _ids(group: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(id, group))


def _joined_shape(group: Sequence[Tensor]) -> tuple[int, int]:
    return sum(map(len, group)), group[0].shape[1]


def _current(known: PackedWeights | None, group: Sequence[Tensor]) -> PackedWeights:
    return known if known is not None and known.refresh(group) else PackedWeights(group)


def _measure_gain(groups: Sequence[Sequence[Tensor]], rows: int) -> float:
    """Return the speed of all packed products relative to the plain ones.

    One group of each shape is measured, one shape after another as in a step, so that each is read from memory and not
    from a cache that its last turn filled.
    """
    counts = Counter(map(_joined_shape, groups))
    samples = [_sample(group) for group in {_joined_shape(group): group for group in groups}.values()]
    shares = [
        count * out / sum(map(len, sample)) for ((out, _), count), sample in zip(counts.items(), samples, strict=True)
    ]
    copies = [torch.ops.mkldnn._reorder_linear_weight(torch.cat(sample), _PACKED_FOR) for sample in samples]
    inputs = [torch.ones(rows, sample[0].shape[1], dtype=torch.float32, device="cpu") for sample in samples]
    plain, packed = [[math.inf] * len(samples) for _ in range(2)]
    for _ in range(_ROUNDS):
        for i, (x, sample) in enumerate(zip(inputs, samples, strict=True)):
            started = time.perf_counter()
            for weight in sample:
                F.linear(x, weight)
            plain[i] = min(plain[i], time.perf_counter() - started)
        for i, (x, copy) in enumerate(zip(inputs, copies, strict=True)):
            started = time.perf_counter()
            torch.ops.mkldnn._linear_pointwise(x, copy, None, "none", [], "none")
            packed[i] = min(packed[i], time.perf_counter() - started)
    plain_time, packed_time = (
        sum(share * t for share, t in zip(shares, times, strict=True)) for times in (plain, packed)
    )
    return plain_time / packed_time


def _sample(group: Sequence[Tensor]) -> list[Tensor]:
    """Return the weights of a group, only the first rows of one as large as the embedding."""
    return [weight.detach()[: math.ceil(_SAMPLE_BYTES / (4 * weight.shape[1]))] for weight in group]


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
        values = torch.linspace(-1, 1, 512 * 256, dtype=torch.float32, device="cpu")
        x, weight = values[:2048].view(8, 256), values.view(512, 256)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
        product = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "none")
        return torch.allclose(product, F.linear(x, weight), atol=1e-3)
