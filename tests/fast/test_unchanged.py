"""A part that somebody changed is called, not bypassed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from florence2.fast.linear import Linear
from florence2.fast.unchanged import may_bypass
from florence2.model.davit import Mlp

KNOWN = frozenset((Mlp, Linear))


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
    assert not may_bypass(mlp, KNOWN)  # gradients are wanted
    with torch.no_grad():
        assert may_bypass(mlp, KNOWN) and not may_bypass(mlp.train(), KNOWN)
    with torch.inference_mode():
        assert may_bypass(mlp.eval(), KNOWN)


def replace_by_adapter(mlp: Mlp) -> None:
    mlp.fc1 = Adapter(mlp.fc1)  # type: ignore[assignment]


def replace_by_plain(mlp: Mlp) -> None:
    mlp.fc1 = nn.Linear(4, 8)  # type: ignore[assignment]


def patch(mlp: Mlp) -> None:
    mlp.fc2.forward = lambda x: x  # type: ignore[method-assign]


def parametrize(mlp: Mlp) -> None:
    torch.nn.utils.parametrizations.weight_norm(mlp.fc1)


class Louder(Linear):
    """A subclass that somebody wrote."""


def subclass(mlp: Mlp) -> None:
    mlp.fc1 = Louder(4, 8)


def wrap(mlp: Mlp) -> None:
    mlp.fc1 = nn.Sequential(mlp.fc1, nn.Tanh())  # type: ignore[assignment]


@torch.no_grad()
def test_hooks_on_all_modules_and_autocast() -> None:
    mlp = Mlp(4, 8).eval()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not may_bypass(mlp, KNOWN)
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert not may_bypass(mlp, KNOWN)
    assert may_bypass(mlp, KNOWN)


@pytest.mark.parametrize(
    "change",
    [
        replace_by_adapter,
        replace_by_plain,
        subclass,
        wrap,
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
    assert not may_bypass(mlp, KNOWN)
