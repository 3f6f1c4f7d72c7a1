"""The routines for one product, and the choice between them."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from florence2.fast import linear as linear_module
from florence2.fast.linear import Linear, convolve, linear


@pytest.mark.parametrize("shape", [(1, 48), (3, 48), (31, 48), (32, 48), (100, 48), (700, 48), (2, 7, 9, 48)])
@pytest.mark.parametrize("with_bias", [True, False])
@torch.no_grad()
def test_equals_torchs(shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(80, 48), torch.randn(80) if with_bias else None
    for product in (linear, convolve):
        out = product(x, weight, bias)
        assert out.shape == (*shape[:-1], 80) and out.is_contiguous()
        assert torch.allclose(out, F.linear(x, weight, bias), atol=1e-4)


@torch.no_grad()
def test_views_that_are_not_contiguous() -> None:
    x, weight = torch.randn(48, 64).t(), torch.randn(96, 20).t()[:, ::2]
    for product in (linear, convolve):
        assert torch.allclose(product(x, weight), x @ weight.t(), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_types_are_torchs_own(dtype: torch.dtype) -> None:
    x, weight = torch.randn(64, 48, dtype=dtype), torch.randn(80, 48, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_gradients_flow() -> None:
    layer = Linear(48, 80)
    layer(torch.randn(64, 48)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(("plain", "convolution", "chosen"), [(1.0, 0.5, True), (1.0, 0.8, False), (0.5, 1.0, False)])
@torch.no_grad()
def test_the_faster_routine_is_chosen_once_for_a_shape(
    plain: float, convolution: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only the two routines move: the convolution must gain more than the margin."""
    now, calls = [0.0], {"plain": 0, "convolution": 0}
    product, convolve_product = F.linear, linear_module.convolve

    def timed_linear(*arguments: torch.Tensor) -> torch.Tensor:
        now[0] += plain
        calls["plain"] += 1
        return product(*arguments)

    def timed_convolve(*arguments: torch.Tensor) -> torch.Tensor:
        now[0] += convolution
        calls["convolution"] += 1
        return convolve_product(*arguments)

    monkeypatch.setattr(F, "linear", timed_linear)
    monkeypatch.setattr(linear_module, "convolve", timed_convolve)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(linear_module, "_chosen", {})
    x, weight = torch.randn(64, 48), torch.randn(80, 48)
    for _ in range(3):
        linear(x, weight)
    assert calls == ({"plain": 3, "convolution": 6} if chosen else {"plain": 6, "convolution": 3})
    linear(torch.randn(2, 48), weight)  # too few rows for a convolution
    assert calls["convolution"] == (6 if chosen else 3)


@torch.no_grad()
def test_a_replaced_forward_of_torchs_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear(48, 80)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x * 0)
    assert layer(torch.ones(64, 48)).shape == (64, 48)
