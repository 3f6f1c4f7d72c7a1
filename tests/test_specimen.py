"""nano's answers equal the recorded ones of Microsoft's code, and a changed model is noticed."""

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


def test_all_answers_are_recorded() -> None:
    assert len(read_records(SCENES)) > 14 * SCENES and all(ids[-1] == 2 for ids in read_records(SCENES))


# Answers of a trained model survive small changes; tests/test_records.py notices those, on synthetic weights.


def no_depthwise(model: Florence2Model) -> None:
    block: Any = model.vision_tower.blocks[2][1]  # type: ignore[index]
    nn.init.zeros_(block.channel_block.conv2.weight)


def other_epsilon(model: Florence2Model) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1


def swapped_pooling(model: Florence2Model) -> None:
    model.multi_modal_projector.sources = model.multi_modal_projector.sources[::-1]


@pytest.mark.release
@pytest.mark.parametrize("change", [no_depthwise, other_epsilon, swapped_pooling])
def test_a_changed_model_is_noticed(nano: Florence2, change: Callable[[Florence2Model], None]) -> None:
    change(nano.model)
    assert answer_one_by_one(nano, FIRST) != read_records(FIRST)
