"""The search for a kernel that is not float32: it stays silent on a CPU, and names a rounded part and no other."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from florence2.fast.linear import Linear
from parity import stages
from parity.cases import shapes
from parity.stages import INSTALLED, LIMIT, Difference, compare_stages, gpu_shapes

CPU = torch.device("cpu")
Found = dict[tuple[str, str], Difference]


def by_kind() -> Found:
    return {(each.kind, each.way): each for each in compare_stages(shapes()[3], CPU)}


def tf32(x: Tensor) -> Tensor:
    """Round to ten bits of the fraction, as the tensor cores of a GPU do."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_a_cpu_computes_in_float32() -> None:
    found = by_kind()
    assert {way for _, way in found} == {INSTALLED, "plain, sdpa", "plain, eager"}
    kinds = {"Conv2d", "DepthwiseConv", "Linear", "LayerNorm", "Mlp", "WindowAttention", "ChannelAttention"}
    assert {kind for kind, _ in found} > kinds | {"attention", "SpatialBlock", "whole pass: logits"}
    assert 0 < max(each.worst for each in found.values()) < LIMIT / 5


def test_a_rounded_convolution_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Conv2d._conv_forward

    def rounded(self: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        if x.dtype == torch.float32 and self.groups > 1:
            x, weight = tf32(x), tf32(weight)
        return original(self, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", rounded)
    found = {kind: each.worst for (kind, way), each in by_kind().items() if way == "plain, eager"}
    assert 10 * LIMIT < found["DepthwiseConv"] < 1e-2
    assert max(found[kind] for kind in ("Conv2d", "Linear", "LayerNorm", "attention", "ChannelAttention")) < LIMIT / 5


@pytest.mark.release
def test_a_rounded_product_ends_with_1_and_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: original(self, tf32(x)))
    monkeypatch.setattr(stages, "gpu_shapes", lambda: [shapes()[3]])
    assert stages.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "Not float32: " in out and "Linear, two stages" in out and "DepthwiseConv, two" not in out


def test_the_shape_that_was_off_comes_first() -> None:
    vision = gpu_shapes()[0].config.vision
    assert vision.window_size == 7 and vision.dim_embed == (24, 48, 96, 192)
    assert {channels // heads for channels, heads in zip(vision.dim_embed, vision.num_heads, strict=True)} == {8}
