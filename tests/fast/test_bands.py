"""Blocks of the vision tower by bands against the plain formula, and when they step aside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from florence2.fast import bands
from florence2.fast.install import install, uninstall
from florence2.model.config import VisionConfig
from florence2.model.davit import ChannelAttention, DaViT, SpatialBlock
from florence2.model.trace import Trace
from parity.cases import shapes
from tests.release import keep


@pytest.fixture
def config() -> VisionConfig:
    return shapes()[1].config.vision


@pytest.mark.parametrize("positions", keep([1, 2], [1, 40, 200, 100_000]))
@pytest.mark.parametrize("size", [(64, 96), (160, 128), (70, 66)])
@torch.no_grad()
def test_bands_are_the_plain_formula(
    config: VisionConfig, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], positions: int
) -> None:
    monkeypatch.setattr(bands, "BAND_POSITIONS", positions)
    torch.manual_seed(3)
    tower = DaViT(config).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    before = x.clone()
    plain = tower(x)
    assert torch.allclose(install(tower)(x), plain, atol=1e-11)
    assert torch.equal(x, before)


@torch.no_grad()
def test_the_bands_are_what_runs(config: VisionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rests = []
    add_rest = bands._add_rest

    def count(block: Any, x: Tensor) -> Tensor:
        rests.append(type(block))
        return add_rest(block, x)

    monkeypatch.setattr(bands, "_add_rest", count)
    install(DaViT(config)).eval()(torch.randn(1, 3, 64, 64))
    assert len(rests) == 2 * sum(config.depths)


class _Shout(Trace):
    """Doubles the output of one channel attention."""

    def enters(self, prefix: str) -> bool:
        return True

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return value * 2 if name.endswith("channel_attn") else value


def _set(part: nn.Module, name: str, value: object) -> None:
    setattr(part, name, value)


CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda block: None,
    "weight in place": lambda block: block.channel_attn.qkv.weight.mul_(1.5),
    "weight by .data": lambda block: block.channel_attn.proj.weight.data.neg_(),
    "rows permuted": lambda block: block.channel_attn.qkv.weight.copy_(block.channel_attn.qkv.weight.flip(0)),
    "hook on attention": lambda block: block.channel_attn.register_forward_hook(lambda m, i, o: o * 2),
    "hook on a linear map": lambda block: block.channel_attn.qkv.register_forward_hook(lambda m, i, o: o * 2),
    "pre-hook on a norm": lambda block: block.norm1.register_forward_pre_hook(lambda m, i: (i[0].flip(-1),)),
    "forward of an instance": lambda block: _set(block.channel_attn, "forward", lambda x, trace: x * 2),
    "another method of an instance": lambda block: _set(block, "_drop_path", lambda branch: branch * 2),
    "a part replaced": lambda block: _set(block.ffn, "fc1", nn.Sequential(block.ffn.fc1, nn.Tanh())),
    "eps": lambda block: _set(block.norm1, "eps", 0.5),
    "groups": lambda block: _set(block.channel_attn, "groups", 1),
    "in training": lambda block: _set(block.train(), "drop_path_rate", 1.0 - 1e-9),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_block_gives_what_the_plain_one_gives(config: VisionConfig, change: str) -> None:
    torch.manual_seed(1)
    tower, x = install(DaViT(config)).eval(), torch.randn(1, 3, 64, 64)
    original = tower(x)
    CHANGES[change](tower.blocks[0][0].channel_block)  # type: ignore[index]
    fast = tower(x)
    plain = uninstall(tower)(x)
    assert torch.allclose(fast, plain, atol=1e-4)
    assert torch.allclose(plain, original, atol=1e-4) == (change == "nothing")


@torch.no_grad()
def test_a_method_replaced_on_a_class_is_called(config: VisionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    tower, x = install(DaViT(config)).eval(), torch.randn(1, 3, 64, 64)
    original, forward = tower(x), ChannelAttention.forward
    monkeypatch.setattr(ChannelAttention, "forward", lambda self, x, trace: 2 * forward(self, x, trace))
    assert not torch.allclose(tower(x), original, atol=1e-3)
    monkeypatch.undo()
    assert torch.equal(tower(x), original)
    linear_forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * linear_forward(self, x))
    assert torch.allclose(tower(x), uninstall(tower)(x), atol=1e-4)


@torch.no_grad()
def test_a_new_method_on_a_class_is_called(config: VisionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    tower, x = install(DaViT(config)).eval(), torch.randn(1, 3, 64, 64)
    original = tower(x)
    monkeypatch.setattr(SpatialBlock, "__call__", lambda self, x, trace: x, raising=False)
    assert not torch.allclose(tower(x), original, atol=1e-3)


@torch.no_grad()
def test_a_traced_block_shows_its_values(config: VisionConfig) -> None:
    tower, x = install(DaViT(config)).eval(), torch.randn(1, 3, 64, 64)
    assert torch.allclose(tower(x, _Shout()), uninstall(tower)(x, _Shout()), atol=1e-4)


def test_gradients_flow(config: VisionConfig) -> None:
    tower, x = install(DaViT(config)).eval(), torch.randn(1, 3, 64, 64, requires_grad=True)
    tower(x).sum().backward()
    assert x.grad is not None and x.grad.any()


@torch.no_grad()
def test_a_call_replaced_for_all_modules_is_called(config: VisionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    tower, x = install(DaViT(config)).eval(), torch.randn(1, 3, 64, 64)
    original, call = tower(x), nn.Module.__call__

    def louder(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        out = call(self, *arguments, **keywords)
        return out * 1.5 if isinstance(self, ChannelAttention) else out

    monkeypatch.setattr(nn.Module, "__call__", louder)
    fast = tower(x)
    assert torch.allclose(fast, uninstall(tower)(x), atol=1e-4) and not torch.allclose(fast, original, atol=1e-3)
