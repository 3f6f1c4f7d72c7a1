"""The distance of two tensors, against the formulas on the whole of them."""

import math

import pytest
import torch

from florence2.inspect.audit import measures
from florence2.inspect.audit.change import TensorChange, measure_change, no_change, sum_changes
from florence2.inspect.audit.measures import measure_values


@pytest.fixture(autouse=True)
def by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "_PART", 16)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_is(found: TensorChange, a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = a.double().flatten(), b.double().flatten()
    assert found.norms == pytest.approx((float(a.norm()), float(b.norm())))
    assert found.distance == pytest.approx(float((a - b).norm()))
    assert found.relative == pytest.approx(float((a - b).norm() / a.norm()))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))
    assert found.maximum == pytest.approx(float((a - b).abs().max()))
    assert found.changed == int((a != b).sum()) and found.non_finite == 0


def test_a_change() -> None:
    a, b = noise(1, 21, 5), noise(2, 21, 5).half()
    b[:7] = a[:7]  # rounded, so still a change
    assert_is(measure_change(a, b), a, b)
    few = a.clone()
    few[3, 1] += 2
    assert measure_change(a, few).changed == 1
    assert_is(measure_change(a, few), a, few)


def test_none() -> None:
    a = noise(1, 21, 5)
    for found in (measure_change(a, a), no_change(measure_values(a))):
        assert_is(found, a, a)


def test_what_was_zero_has_no_relative_change() -> None:
    zero, one = torch.zeros(3, 2), torch.ones(3, 2)
    found = measure_change(zero, one)
    assert (found.relative, found.cosine, found.maximum, found.changed) == (None, None, 1.0, 6)
    assert measure_change(one, zero).relative == 1 and measure_change(zero, zero).relative == 0


def test_values_that_are_not_finite() -> None:
    a, b = noise(1, 9, 2), noise(2, 9, 2)
    a[0, 0] = b[0, 0] = math.nan  # equal
    a[1, 0] = math.inf  # changed
    b[2, 1] = math.nan
    found = measure_change(a, b)
    assert (found.changed, found.non_finite) == (17, 3)
    both = a.isfinite() & b.isfinite()
    assert found.distance == pytest.approx(float((a[both] - b[both]).norm()))
    everywhere = measure_change(torch.full((5, 5), math.nan), torch.full((5, 5), math.nan))
    assert (everywhere.changed, everywhere.non_finite, everywhere.distance) == (0, 25, 0.0)


def test_several_as_one() -> None:
    first, second = (noise(1, 8, 3), noise(2, 8, 3)), (noise(3, 5, 5), noise(4, 5, 5))
    found = sum_changes([measure_change(*first), measure_change(*second)])
    assert_is(found, *(torch.cat([x.flatten(), y.flatten()]) for x, y in zip(first, second, strict=True)))
