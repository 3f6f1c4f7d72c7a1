"""The two ways of one product."""

import pytest
import torch
import torch.nn.functional as F

from florence2.fast.linear import Linear, linear


@pytest.mark.parametrize("shape", [(1, 48), (3, 48), (31, 48), (32, 48), (100, 48), (2, 7, 9, 48)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_torchs(shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(80, 48), torch.randn(80) if with_bias else None
    with torch.no_grad():
        out = linear(x, weight, bias)
    assert out.shape == (*shape[:-1], 80) and out.is_contiguous()
    assert torch.allclose(out, F.linear(x, weight, bias), atol=1e-4)


def test_views_that_are_not_contiguous() -> None:
    x, weight = torch.randn(48, 64).t(), torch.randn(96, 20).t()[:, ::2]
    with torch.no_grad():
        assert torch.allclose(linear(x, weight), x @ weight.t(), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_torchs_own(dtype: torch.dtype) -> None:
    x, weight = torch.randn(64, 48, dtype=dtype), torch.randn(80, 48, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_gradients_flow() -> None:
    layer = Linear(48, 80)
    layer(torch.randn(64, 48)).sum().backward()
    assert layer.weight.grad is not None


def test_the_convolution_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    convolve = F.conv2d

    def spy(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        rows.append(x.shape[-1])
        out: torch.Tensor = convolve(x, *rest)
        return out

    monkeypatch.setattr(F, "conv2d", spy)
    with torch.no_grad():
        linear(torch.randn(64, 48), torch.randn(80, 48))
        linear(torch.randn(2, 48), torch.randn(80, 48))
    assert rows == [64]
