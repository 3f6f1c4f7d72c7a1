"""The specimen's answers as Microsoft's code gives them, recorded; and that comparing with them notices a change."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import florence2
from florence2.model.florence2 import Florence2Model
from florence2.pipeline import Florence2
from parity.specimen import SCENES, answer_in_batches, answer_one_by_one, read_records

FIRST = 2


@pytest.fixture
def nano() -> Florence2:
    return florence2.load("nano", device="cpu")


def test_the_first_recorded_answers(nano: Florence2) -> None:
    """`python -m parity` compares all of them."""
    assert answer_one_by_one(nano, FIRST) == read_records(FIRST) == answer_in_batches(nano, FIRST)


def test_as_many_as_are_said_were_recorded() -> None:
    assert len(read_records(SCENES)) > 14 * SCENES and all(ids[-1] == 2 for ids in read_records(SCENES))


# Trained answers bear small changes; tests/test_records.py shows that those are noticed on made-up weights.


def no_depthwise(model: Florence2Model) -> None:
    block: Any = model.vision_tower.blocks[2][1]  # type: ignore[index]
    nn.init.zeros_(block.channel_block.conv2.weight)


def other_epsilon(model: Florence2Model) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1


def swapped_pooling(model: Florence2Model) -> None:
    model.multi_modal_projector.sources = model.multi_modal_projector.sources[::-1]


@pytest.mark.parametrize("change", [no_depthwise, other_epsilon, swapped_pooling])
def test_a_changed_model_is_noticed(nano: Florence2, change: Callable[[Florence2Model], None]) -> None:
    change(nano.model)
    assert answer_one_by_one(nano, FIRST) != read_records(FIRST)
