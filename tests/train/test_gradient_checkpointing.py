"""Gradient checkpointing gives identical numbers and keeps less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train import grouping
from florence2.train.data import Batch
from florence2.train.freeze import freeze
from florence2.train.gradient_checkpointing import LAYERS, gradient_checkpointing
from florence2.train.loss import LossModule
from tests.release import keep
from tests.train.steps import backward, batch_of


@pytest.fixture(scope="module")
def batch(processor: Processor) -> Batch:
    return batch_of(processor)


def step(model: Florence2Model, batch: Batch, active: bool, autocast: bool = False, seed: int = 4) -> Any:
    torch.manual_seed(seed)
    with gradient_checkpointing(model, active):
        return backward(model, batch, autocast)


@pytest.mark.parametrize("dropout", keep([1], [False, True]))
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_the_same_bits(
    mini: Florence2Model, batch: Batch, dropout: bool, autocast: bool
) -> None:
    mini.train(dropout)
    loss, gradients = step(mini, batch, active=False, autocast=autocast)
    found, same = step(mini, batch, active=True, autocast=autocast)
    other, _ = step(mini, batch, active=True, autocast=autocast, seed=5)
    assert found == loss and same.keys() == gradients.keys()
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    assert (other != loss) is dropout


def test_with_a_frozen_tower_the_rest_still_learns(mini: Florence2Model, batch: Batch) -> None:
    freeze(mini, ["vision"])
    (loss, gradients), (found, same) = step(mini, batch, active=False), step(mini, batch, active=True)
    assert found == loss and same.keys() == gradients.keys() and gradients
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)


def kept(model: Florence2Model, batch: Batch, active: bool) -> int:
    """Count the bytes that the forward pass keeps for the backward pass, without weights."""
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with gradient_checkpointing(model, active), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = LossModule(model)(batch)
        loss.backward()
    return sum(sizes.values())


def test_less_is_kept(mini: Florence2Model, batch: Batch) -> None:
    assert kept(mini.train(), batch, active=True) < kept(mini, batch, active=False) / 2


def test_every_layer_computes_twice_and_is_itself_again(
    mini: Florence2Model, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "PADDING", 1.0)  # so that all rows are computed together
    layers = [m for m in mini.modules() if isinstance(m, LAYERS)]
    assert len(layers) == 6  # two blocks in each of two stages, an encoder layer and a decoder layer
    calls: list[nn.Module] = []

    def counted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(self: nn.Module, *inputs: Any) -> Tensor:
            calls.append(self)
            return original(self, *inputs)

        return forward

    for kind in LAYERS:
        monkeypatch.setattr(kind, "forward", counted(kind.forward))
    step(mini, batch, active=True)
    assert [calls.count(layer) for layer in layers] == [2] * 6
    step(mini, batch, active=False)
    assert [calls.count(layer) for layer in layers] == [3] * 6
    assert not [m for m in mini.modules() if "forward" in vars(m)]


def test_only_the_chosen_layers_compute_twice(
    mini: Florence2Model, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients stay the same bits."""
    monkeypatch.setattr(grouping, "PADDING", 1.0)  # so that all rows are computed together
    calls: list[str] = []
    paths = {"vision_tower.blocks.0.0.channel_block", "language_model.encoder.layers.0"}
    inner = {path: layer for path, layer in mini.named_modules() if isinstance(layer, LAYERS)}
    for path, layer in inner.items():
        norm = next(part for part in layer.modules() if isinstance(part, nn.LayerNorm))
        norm.register_forward_hook(lambda *_, path=path: calls.append(path))  # type: ignore[misc]
    (loss, gradients), plain = step(mini, batch, active=False), calls.copy()
    calls.clear()
    torch.manual_seed(4)
    with gradient_checkpointing(mini, paths=paths):
        found, same = backward(mini, batch)
    assert {path: calls.count(path) for path in plain} == {path: 1 + (path in paths) for path in plain}
    assert found == loss and all(torch.equal(same[name], gradients[name]) for name in gradients)


def test_an_error_inside_leaves_the_model_as_it_was(mini: Florence2Model) -> None:
    with pytest.raises(KeyError), gradient_checkpointing(mini):
        raise KeyError
    assert not [m for m in mini.modules() if "forward" in vars(m)]


def test_the_model_still_answers_inside(mini: Florence2Model, batch: Batch) -> None:
    """Evaluation comes in the middle of a run."""
    mini.eval()
    options = GenerationOptions(num_beams=2, max_new_tokens=6)

    def answer() -> Tensor:
        with torch.no_grad():
            memory = mini.encode(mini.encode_image(batch.pixel_values[:1]), batch.input_ids[:1, :3])
        return generate(mini, memory, options).sequences

    outside = answer()
    with gradient_checkpointing(mini):
        assert torch.equal(answer(), outside)
