"""A part that somebody changed is called, not bypassed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from florence2.davit import Mlp
from florence2.shortcuts import may_bypass


class Adapter(nn.Module):
    """What LoRA does: a module in the place of a linear map."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + 1.0
        return out


def test_as_built() -> None:
    mlp = Mlp(4, 8).eval()
    assert not may_bypass(mlp)  # gradients are wanted
    with torch.no_grad():
        assert may_bypass(mlp) and not may_bypass(mlp.train())
    with torch.inference_mode():
        assert may_bypass(mlp.eval())


def replace_by_adapter(mlp: Mlp) -> None:
    mlp.fc1 = Adapter(mlp.fc1)  # type: ignore[assignment]


def replace_by_plain(mlp: Mlp) -> None:
    mlp.fc1 = nn.Linear(4, 8)  # type: ignore[assignment]


def patch(mlp: Mlp) -> None:
    mlp.fc2.forward = lambda x: x  # type: ignore[method-assign]


def parametrize(mlp: Mlp) -> None:
    torch.nn.utils.parametrizations.weight_norm(mlp.fc1)


@pytest.mark.parametrize(
    "change",
    [
        replace_by_adapter,
        replace_by_plain,
        patch,
        parametrize,
        lambda mlp: mlp.fc1.register_forward_hook(lambda *_: None),
        lambda mlp: mlp.register_forward_pre_hook(lambda *_: None),
    ],
)
@torch.no_grad()
def test_changed(change: Callable[[Mlp], object]) -> None:
    mlp = Mlp(4, 8).eval()
    change(mlp)
    assert not may_bypass(mlp)
