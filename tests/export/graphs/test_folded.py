"""Folded channel attention against the plain one."""

import copy

import pytest
import torch

from florence2 import Florence2
from florence2.export.graphs.folded import FoldedChannelAttention, fold_channel_attention
from florence2.model.davit import ChannelAttention


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    plain = ChannelAttention(24, 3, bias).eval()
    x = torch.randn(2, 9, 7, 24)
    with torch.no_grad():
        torch.testing.assert_close(FoldedChannelAttention(plain)(x), plain(x), rtol=0, atol=1e-6)


def test_stages_with_few_positions_stay_plain_and_the_model_is_unchanged(nano: Florence2) -> None:
    tower = nano.model.vision_tower
    before = copy.deepcopy(tower.state_dict())
    # 48 x 48, 24 x 24 and 12 x 12 positions of 48, 96 and 160 channels
    folded = fold_channel_attention(tower, 192, 192)
    kinds = [type(stage[0].channel_block.channel_attn) for stage in folded.blocks]
    assert kinds == [FoldedChannelAttention, FoldedChannelAttention, ChannelAttention]
    assert not any(isinstance(module, FoldedChannelAttention) for module in tower.modules())
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    held = {parameter.data_ptr() for parameter in tower.parameters()}
    assert {parameter.data_ptr() for parameter in folded.convs.parameters()} <= held
