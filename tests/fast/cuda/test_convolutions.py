"""Convolutions without cuDNN: the plain numbers, wherever they may be used, and no switch of torch touched."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from florence2 import Florence2
from florence2.fast.cuda import convolutions
from florence2.fast.cuda.convolutions import Conv2d, FastDepthwiseConv, why_plain
from florence2.fast.install import install, uninstall
from florence2.model.davit import DepthwiseConv

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
Made = dict[str, Any]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """Take the way of a GPU here; the keywords of every call of torch's operator."""
    seen: list[Made] = []
    original = torch._convolution

    def convolution(*arguments: Any, **settings: Any) -> Tensor:
        seen.append(settings)
        return original(*arguments, **settings)

    monkeypatch.setattr(torch, "_convolution", convolution)
    monkeypatch.setattr(convolutions, "why_plain", lambda *_: None)
    return seen


def pixels() -> Tensor:
    return torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def test_the_tower_gives_the_same_numbers(mini: Florence2, calls: list[Made]) -> None:
    plain = uninstall(copy.deepcopy(mini.model)).vision_tower
    tower = install(copy.deepcopy(plain))
    convs = [part for part in tower.modules() if isinstance(part, nn.Conv2d)]
    assert {type(part) for part in convs} == {Conv2d, FastDepthwiseConv}
    expected = plain(pixels())
    assert not calls
    torch.testing.assert_close(tower(pixels()), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == len(convs) and all(not call["cudnn_enabled"] and not call["allow_tf32"] for call in calls)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_one_convolution_is_bit_equal_and_keeps_its_layout(stride: int, bias: bool, calls: list[Made]) -> None:
    for plain in (nn.Conv2d(3, 8, 5, stride, 2, bias=bias), DepthwiseConv(3)):
        x = torch.randn(2, 3, 12, 10).to(memory_format=torch.channels_last)
        conv = install(copy.deepcopy(plain))
        given = x.permute(0, 2, 3, 1) if isinstance(plain, DepthwiseConv) else x
        mine, other = conv(given), plain(given)
        assert torch.equal(mine, other) and mine.stride() == other.stride()
    assert len(calls) == 2


def test_hooks_see_the_values(calls: list[Made]) -> None:
    conv, seen = install(nn.Conv2d(3, 4, 3)), list[Any]()
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.inference_mode():
        conv(torch.randn(1, 3, 5, 5))
    assert seen == [(1, 4, 3, 3)] and len(calls) == 1


def test_a_replaced_method_of_one_object_is_called(calls: list[Made]) -> None:
    conv: Any = install(nn.Conv2d(3, 4, 3))
    conv._conv_forward = lambda x, weight, bias: x + 1
    with torch.inference_mode():
        assert torch.equal(conv(torch.zeros(1)), torch.ones(1)) and not calls


@torch.inference_mode()
def test_when_it_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    conv: Any = install(nn.Conv2d(3, 4, 3))
    assert why_plain(conv, CUDA, torch.float32) is None
    assert why_plain(conv, CPU, torch.float32) == "the model is on cpu"
    assert why_plain(conv, CUDA, torch.bfloat16) == "the weights are bfloat16, not float32"
    mirrored: Any = install(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    assert "reflect" in str(why_plain(mirrored, CUDA, torch.float32))
    named: Any = install(nn.Conv2d(3, 4, 3, padding="same"))
    assert "same" in str(why_plain(named, CUDA, torch.float32))
    with torch.enable_grad():
        assert why_plain(conv, CUDA, torch.float32) == "gradients are on"
    with torch.autocast("cpu", torch.bfloat16):
        assert why_plain(conv, CUDA, torch.float32) == "autocast is on"
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *_: None)
    assert why_plain(conv, CUDA, torch.float32) == "Conv2d._conv_forward was replaced"


@torch.inference_mode()
def test_the_switches_of_the_process_stay(mini: Florence2, calls: list[Made]) -> None:
    def switches() -> tuple[Any, ...]:
        cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
        return cudnn.enabled, cudnn.allow_tf32, cudnn.benchmark, cuda.matmul.allow_tf32

    before, during = switches(), []
    model = copy.deepcopy(mini.model)
    model.vision_tower.convs[0].conv.register_forward_hook(lambda *_: during.append(switches()))
    model.encode_image(pixels())
    assert during == [before] and switches() == before and calls
