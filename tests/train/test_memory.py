"""The memory of an update, estimated without data: what autograd keeps, and what recomputation saves."""

import pytest
import torch
from torch import Tensor

from florence2.model.florence2 import Florence2Model
from florence2.train.freeze import freeze
from florence2.train.gradient_checkpointing import LAYERS
from florence2.train.lora import LoraSettings, add_lora
from florence2.train.memory import BatchShape, LayerMemory, UpdateMemory, estimate_update
from tests.release import keep

SHAPE = BatchShape(images=2, pairs=3, prompt=7, answer=9, height=64, width=64)


def kept(model: Florence2Model, shape: BatchShape) -> int:
    """Count the bytes that autograd really keeps up to the last hidden state, without weights."""
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(shape.pairs, shape.prompt, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = model.encode_image(torch.zeros(shape.images, 3, shape.height, shape.width))
        memory = model.encode(features[torch.arange(shape.pairs) % shape.images], ids, ids == 0)
        language = model.language_model
        language.decoder(language.embed_answer(torch.zeros(shape.pairs, shape.answer, dtype=torch.long)), memory)
    return sum(sizes.values())


def estimated(model: Florence2Model, shape: BatchShape = SHAPE, bfloat16: bool = False) -> UpdateMemory:
    update = estimate_update(model, shape, bfloat16)
    assert update is not None
    return update


def total(update: UpdateMemory) -> int:
    return update.rest + sum(layer.inside for layer in update.layers)


@pytest.mark.parametrize("parts", [[], ["vision"], ["vision", "projection", "encoder", "embeddings"]])
@pytest.mark.parametrize("dropout", keep([1], [False, True]))
def test_the_estimate_counts_what_autograd_keeps(mini: Florence2Model, parts: list[str], dropout: bool) -> None:
    freeze(mini, parts)
    if not dropout:
        mini.eval()
    update = estimated(mini)
    assert total(update) == pytest.approx(kept(mini, SHAPE), rel=0.02)
    trained = sum(p.nbytes for p in mini.parameters() if p.requires_grad)
    assert update.gradients + sum(layer.gradients for layer in update.layers) == trained
    if parts:
        vision = [layer for layer in update.layers if layer.path.startswith("vision_tower")]
        assert len(vision) == 4 and sum(layer.inside + layer.gradients for layer in vision) == 0


def test_the_model_is_left_as_it_was(mini: Florence2Model) -> None:
    before = dict(mini.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    estimated(mini)
    for name, parameter in mini.named_parameters():
        assert parameter is before[name] and torch.equal(parameter, values[name]) and parameter.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mini.modules())


def test_lora_and_autocast_are_seen(mini: Florence2Model) -> None:
    whole, half = total(estimated(mini)), total(estimated(mini, bfloat16=True))
    assert half < 0.8 * whole
    add_lora(mini, LoraSettings(2, 4.0))
    adapter = estimated(mini)
    assert total(adapter) < whole
    assert adapter.gradients + sum(layer.gradients for layer in adapter.layers) < 100_000


def test_the_estimate_grows_with_the_batch(mini: Florence2Model) -> None:
    one, two = estimated(mini, BatchShape(1, 2, 7, 9, 64, 64)), estimated(mini, BatchShape(2, 4, 7, 9, 64, 64))
    assert total(two) == pytest.approx(2 * total(one), rel=0.05)
    assert total(one.scaled(2)) == pytest.approx(total(two), rel=0.05)


def test_a_model_that_needs_data_is_not_estimated(mini: Florence2Model) -> None:
    mini.language_model.encoder.register_forward_hook(lambda *given: float(given[2].sum()))
    assert estimate_update(mini, SHAPE) is None


def chain(*sizes: tuple[int, int]) -> tuple[LayerMemory, ...]:
    return tuple(LayerMemory(str(place), inside, 1, own) for place, (inside, own) in enumerate(sizes))


def test_the_last_layers_keep_what_they_have() -> None:
    """The first one, recomputed, takes 100 and half as much again: the last two keep 90 until then."""
    update = UpdateMemory(chain((100, 0), (60, 0), (50, 0), (40, 0)), rest=10, gradients=0)
    assert update.peak() == 10 + 210 + 60 and update.peak(["0", "1", "2", "3"]) == 10 + 150
    assert update.worth_recomputing() == ["0", "1"]
    assert update.peak(["0", "1"]) == 10 + 150


def test_gradients_that_are_there_at_the_end_leave_room_before() -> None:
    """Each layer's gradients take 60, which only the first meets all of."""
    update = UpdateMemory(chain((100, 60), (100, 60), (100, 60)), rest=0, gradients=0)
    assert update.worth_recomputing() == ["0"]
    assert update.worth_recomputing(accumulates=True) == ["0", "1"]
    assert update.peak(["0"], accumulates=True) > update.peak(["0", "1"], accumulates=True)


def test_what_recomputing_cannot_help_is_not_recomputed(mini: Florence2Model) -> None:
    freeze(mini, ["vision"])
    update = estimated(mini)
    frozen = [layer.path for layer in update.layers if layer.path.startswith("vision_tower")]
    assert frozen and not set(update.worth_recomputing()) & set(frozen)
    assert len(update.layers) == sum(isinstance(module, LAYERS) for module in mini.modules())
