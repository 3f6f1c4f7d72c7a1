"""A part that somebody changed is called, not bypassed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from florence2.fast.install import install
from florence2.fast.linear import Linear
from florence2.fast.unchanged import is_unchanged, remember, structure
from florence2.model.davit import Mlp

KNOWN = remember(frozenset((Mlp, Linear)))


class Adapter(nn.Module):
    """What LoRA does: a module in the place of a linear map."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + 1.0
        return out


def test_as_built() -> None:
    mlp = install(Mlp(4, 8)).eval()
    assert not is_unchanged(mlp, KNOWN)  # gradients are wanted
    with torch.no_grad():
        assert is_unchanged(mlp, KNOWN) and not is_unchanged(mlp.train(), KNOWN)
    with torch.inference_mode():
        assert is_unchanged(mlp.eval(), KNOWN)


def replace_by_adapter(mlp: Mlp) -> None:
    mlp.fc1 = Adapter(mlp.fc1)  # type: ignore[assignment]


def replace_by_plain(mlp: Mlp) -> None:
    mlp.fc1 = nn.Linear(4, 8)  # type: ignore[assignment]


def patch(mlp: Mlp) -> None:
    mlp.fc2.forward = lambda x: x  # type: ignore[method-assign, assignment]


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
    mlp = install(Mlp(4, 8)).eval()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_unchanged(mlp, KNOWN)
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_unchanged(mlp, KNOWN)
    assert is_unchanged(mlp, KNOWN)


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
    mlp = install(Mlp(4, 8)).eval()
    change(mlp)
    assert not is_unchanged(mlp, KNOWN)


def set_flag(mlp: Mlp) -> None:
    mlp.note = "an attribute that hides no method"  # type: ignore[assignment]


@torch.no_grad()
def test_attributes_that_hide_no_method_are_harmless() -> None:
    mlp = install(Mlp(4, 8)).eval()
    set_flag(mlp)
    assert is_unchanged(mlp, KNOWN)
    mlp.extra_repr = lambda: "changed"  # type: ignore[method-assign]
    assert not is_unchanged(mlp, KNOWN)


@torch.no_grad()
def test_a_part_in_training_is_seen() -> None:
    mlp = install(Mlp(4, 8)).eval()
    mlp.fc2.train()
    assert not is_unchanged(mlp, KNOWN)


@pytest.mark.parametrize("kind", [Mlp, Linear, nn.Linear])
@torch.no_grad()
def test_a_class_with_another_method_is_seen(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = install(Mlp(4, 8)).eval()
    monkeypatch.setattr(kind, "forward", lambda self, x: x)
    assert not is_unchanged(mlp, KNOWN)
    monkeypatch.undo()
    assert is_unchanged(mlp, KNOWN)
    monkeypatch.setattr(kind, "__call__", lambda self, x: x, raising=False)
    assert not is_unchanged(mlp, KNOWN)


def test_the_structure_is_all_but_the_tensors() -> None:
    mlp = nn.Sequential(Mlp(4, 8), nn.LayerNorm(4))
    before = structure(mlp)
    with torch.no_grad():
        mlp[0].fc1.weight.zero_()  # type: ignore[union-attr]
    assert structure(mlp) == before
    mlp[1].eps = 0.5  # type: ignore[assignment]
    assert structure(mlp) != before
    changed = structure(mlp)
    mlp[0].activation = torch.tanh  # type: ignore[assignment]
    assert structure(mlp) != changed
    twice = nn.ModuleList([mlp[0], mlp[1]])
    assert structure(nn.ModuleList([mlp[0], mlp[1], mlp[0]])) != structure(twice)
