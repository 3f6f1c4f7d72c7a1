"""A frozen tower: its output, and a digest that changes with everything that changes the output."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from florence2.fast.install import install
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train.freeze import freeze
from florence2.train.lora import LoraSettings, add_lora
from florence2.train.store.tower import FrozenTower, is_frozen
from tests.train.steps import SAMPLES


def test_it_computes_what_the_model_computes(mini: Florence2Model, processor: Processor) -> None:
    """In training too, without dropout and without a graph, on its own in a batch of any size."""
    pixels = torch.cat([processor.image(sample.image) for sample in SAMPLES])
    expected = mini.eval().vision_tower(pixels)
    mini.train()
    tower = FrozenTower(mini, processor, at_once=3)
    grids = tower.encode(pixels)
    assert not grids.requires_grad and grids.shape[1:] == tower.shape
    assert grids[0].nbytes == tower.grid_bytes
    torch.testing.assert_close(grids, expected)
    assert torch.equal(tower.encode(pixels[:1])[0], grids[0])
    assert torch.equal(tower.encode(pixels[1:])[1], grids[2])


def test_under_autocast_it_gives_bfloat16(mini: Florence2Model, processor: Processor) -> None:
    pixels = processor.image(SAMPLES[0].image)
    tower = FrozenTower(mini, processor, "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        expected = mini.eval().vision_tower(pixels)
    grid = tower.encode(pixels)
    assert tower.at_once == 1 and grid.dtype == tower.dtype == torch.bfloat16
    assert torch.equal(grid, expected.to(torch.bfloat16)) and grid[0].nbytes == tower.grid_bytes


def nudge(model: Florence2Model) -> None:
    with torch.no_grad():
        model.vision_tower.convs[0].conv.bias[3] += 1e-3


def reshape(model: Florence2Model) -> None:
    model.config = replace(model.config, vision=replace(model.config.vision, window_size=8))


def exchange(model: Florence2Model) -> None:
    class Own(nn.LayerNorm): ...

    model.vision_tower.convs[0].norm.__class__ = Own


@pytest.mark.parametrize("change", [nudge, reshape, exchange, lambda model: model.double()])
def test_another_tower_has_another_digest(
    mini: Florence2Model, processor: Processor, change: Callable[[Florence2Model], object]
) -> None:
    before = FrozenTower(mini, processor).digest
    assert len(before) == 32 and FrozenTower(mini, processor).digest == before
    change(mini)
    assert FrozenTower(mini, processor).digest != before


def test_other_pixels_and_another_precision_too(mini: Florence2Model, processor: Processor) -> None:
    changed = processor.changed(image_config=replace(processor.image_config, resample=2))
    white = processor.changed(background="white")
    digests = [FrozenTower(mini, each).digest for each in (processor, changed, white)]
    assert len({*digests, FrozenTower(mini, processor, "bfloat16").digest}) == 4


def test_what_leaves_the_tower_alone_keeps_its_digest(mini: Florence2Model, processor: Processor) -> None:
    """Training of the rest, an adapter on the language model, faster counterparts."""
    before = FrozenTower(mini, processor).digest
    with torch.no_grad():
        mini.language_model.shared.weight += 1
    add_lora(mini, LoraSettings(2))
    install(mini)
    assert FrozenTower(mini, processor).digest == before


def test_frozen_means_wholly_frozen(mini: Florence2Model) -> None:
    assert not is_frozen(mini)
    freeze(mini, ["vision_tower.blocks.0"])
    assert not is_frozen(mini)
    freeze(mini, ["vision"])
    assert is_frozen(mini)


def test_an_adapter_on_the_language_model_freezes_it(mini: Florence2Model) -> None:
    add_lora(mini, LoraSettings(2))
    assert is_frozen(mini)


def test_an_adapter_in_the_tower_does_not(mini: Florence2Model) -> None:
    add_lora(mini, LoraSettings(2, parts=("vision",)))
    assert not is_frozen(mini)
