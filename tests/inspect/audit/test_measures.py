"""Figures of one tensor, against torch's own on the whole of it."""

import hashlib
import math

import pytest
import torch

from florence2.inspect.audit import measures
from florence2.inspect.audit.measures import (
    NO_UNITS,
    Units,
    Values,
    as_matrix,
    find_dead,
    hash_all,
    hash_tensor,
    measure_spectrum,
    measure_values,
)


@pytest.fixture(autouse=True)
def by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few values at once that every tensor here takes several parts."""
    monkeypatch.setattr(measures, "_PART", 24)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_matrices() -> None:
    assert [tuple(as_matrix(torch.zeros(shape)).shape) for shape in [(4, 3, 5, 5), (4, 3), (4,), (), (0, 3)]] == [
        (4, 75),
        (4, 3),
        (4, 1),
        (1, 1),
        (0, 1),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values(dtype: torch.dtype) -> None:
    tensor = noise(17, 7, dtype=dtype) + 5
    tensor[3, 2:5] = 0
    found, exact = measure_values(tensor), tensor.double()
    assert found.norm == pytest.approx(float(exact.norm()), rel=1e-12)
    assert found.mean == pytest.approx(float(exact.mean()), rel=1e-12)
    assert found.std == pytest.approx(float(exact.std(correction=0)), rel=1e-12)
    assert (found.minimum, found.maximum) == (float(exact.min()), float(exact.max()))
    assert (found.zeros, found.nan, found.infinite) == (3, 0, 0)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    tensor = torch.tensor([[1.0, math.nan, math.inf], [-math.inf, 3.0, math.nan]])
    assert measure_values(tensor) == Values(math.sqrt(10), 2.0, 1.0, 1.0, 3.0, 0, 2, 2)
    assert measure_values(torch.full((30, 2), math.nan)) == Values(0.0, None, None, None, None, 0, 60, 0)


def test_a_constant_has_no_spread() -> None:
    assert measure_values(torch.full((100, 3), 0.1, dtype=torch.float64)).std == pytest.approx(0, abs=1e-16)


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (12, 12)])
def test_a_spectrum_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = noise(*shape)
    found, exact = measure_spectrum(matrix), torch.linalg.svdvals(matrix.double())
    assert found is not None and found.side == min(shape)
    shares = exact / exact.sum()
    assert found.largest == pytest.approx(float(exact[0]), rel=1e-12)
    assert found.stable_rank == pytest.approx(float((exact**2).sum() / exact[0] ** 2), rel=1e-12)
    assert found.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-9)
    held = torch.tensor([float((exact[:r] ** 2).sum()) for r in range(len(exact) + 1)])
    assert held[found.rank_99] >= 0.99 * held[-1] > held[found.rank_99 - 1]


def test_ranks_that_are_known() -> None:
    low = noise(30, 2) @ noise(2, 20)
    found = measure_spectrum(low)
    assert found is not None and found.rank_99 <= 2 and 1 <= found.effective_rank <= 2.001
    identity = measure_spectrum(torch.eye(10))
    assert identity is not None and identity.rank_99 == 10
    assert (identity.largest, identity.stable_rank) == (1, 10) and identity.effective_rank == pytest.approx(10)
    zero = measure_spectrum(torch.zeros(4, 5))
    assert zero is not None and (zero.largest, zero.stable_rank, zero.effective_rank, zero.rank_99) == (0, 0, 0, 0)


def test_the_spectrum_of_a_difference() -> None:
    for shape in ((31, 8), (8, 31)):
        a, b = noise(*shape), noise(*shape) * 0.9 + 0.1
        assert measure_spectrum(a, minus=b) == measure_spectrum(a.double() - b.double())


def test_what_has_no_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_spectrum(noise(9, 1)) is None and measure_spectrum(noise(1, 9)) is None
    monkeypatch.setattr(measures, "MAX_SIDE", 5)
    assert measure_spectrum(noise(6, 9)) is None and measure_spectrum(noise(5, 9)) is not None


def test_dead_rows_and_columns() -> None:
    tensor = noise(20, 6)
    assert find_dead(tensor) == (NO_UNITS, NO_UNITS)
    tensor[4] = 0
    tensor[11] *= 1e-4
    tensor[:, 5] = 0
    assert find_dead(tensor) == (Units(2, (4, 11)), Units(1, (5,)))
    tensor[:, 2] = math.nan  # no row can be judged now
    assert find_dead(tensor) == (NO_UNITS, Units(1, (5,)))


def test_dead_channels_of_a_kernel() -> None:
    kernel = noise(8, 3, 2, 2)
    kernel[:, 1] = 0
    kernel[6] = 0
    assert find_dead(kernel) == (Units(1, (6,)), Units(1, (1,)))
    depthwise = noise(30, 1, 3, 3)
    depthwise[29] = 0
    assert find_dead(depthwise) == (Units(1, (29,)), NO_UNITS)


def test_dead_scales_and_a_dead_tensor() -> None:
    scales = torch.ones(50)
    scales[7:9] = torch.tensor([0.0009, -0.0011])
    assert find_dead(scales) == (Units(1, (7,)), NO_UNITS)
    assert find_dead(torch.zeros(40, 3)) == (Units(40, tuple(range(16))), Units(3, (0, 1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_hash_is_of_type_shape_and_values(dtype: torch.dtype) -> None:
    tensor = noise(19, 4, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    content = bytes(tensor.view(torch.uint8).flatten().tolist())
    assert hash_tensor(tensor) == hashlib.sha256(f"{name} 19x4\n".encode() + content).hexdigest()
    assert hash_tensor(tensor.T.contiguous().T) == hash_tensor(tensor) != hash_tensor(tensor.reshape(4, 19))
    changed = tensor.clone()
    changed[18, 3] += 1
    assert hash_tensor(changed) != hash_tensor(tensor)


def test_the_hash_of_all_does_not_depend_on_their_order() -> None:
    expected = hashlib.sha256(b"22  a.weight\n11  b.weight\n").hexdigest()
    assert hash_all([("b.weight", "11"), ("a.weight", "22")]) == expected
    assert hash_all([("a.weight", "22"), ("b.weight", "11")]) == expected
