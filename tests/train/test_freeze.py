"""Freezing that freezes: no gradient, no decay, no dropout, and counts that say so."""

import pytest
import torch

from florence2.errors import ConfigError
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train.data import Batch
from florence2.train.freeze import PARTS, count_trainable, freeze, set_training
from florence2.train.settings import TrainSettings
from florence2.train.trainer import make_optimizer
from tests.release import keep
from tests.train.steps import backward, batch_of

NAMES = [*PARTS, "vision_tower.blocks.0", "language_model.encoder.layers.0.fc1"]


@pytest.fixture(scope="module")
def batch(processor: Processor) -> Batch:
    return batch_of(processor)


def inside(model: Florence2Model, name: str) -> set[str]:
    """The parameters of a part."""
    paths = PARTS.get(name, (name,))
    return {n for n, _ in model.named_parameters() if any(n.startswith(f"{path}.") for path in paths)}


@pytest.mark.parametrize("name", keep(range(0, len(NAMES), 2), NAMES))
def test_a_frozen_part_gets_no_gradient_and_does_not_move(mini: Florence2Model, batch: Batch, name: str) -> None:
    """Not under weight decay either; everything else learns."""
    freeze(mini, [name])
    frozen = inside(mini, name)
    before = {n: p.detach().clone() for n, p in mini.named_parameters()}
    optimizer = make_optimizer(mini, TrainSettings(learning_rate=1e-2, weight_decay=0.5))
    for seed in range(4):  # stochastic depth may leave a block out of one of them
        torch.manual_seed(seed)
        _, gradients = backward(mini, batch)
        assert not gradients.keys() & frozen
        optimizer.step()
    moved = {n for n, p in mini.named_parameters() if not torch.equal(p, before[n])}
    assert frozen and moved == before.keys() - frozen


def test_several_parts_at_once(mini: Florence2Model) -> None:
    freeze(mini, ["vision", "embeddings"])
    learning = {n for n, p in mini.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in mini.named_parameters()} - inside(mini, "vision") - inside(mini, "embeddings")


def test_counts(mini: Florence2Model) -> None:
    counts = count_trainable(mini)
    assert sum(total for _, total in counts.values()) == sum(p.numel() for p in mini.parameters())
    assert all(trainable == total > 0 for trainable, total in counts.values())
    freeze(mini, ["vision", "language_model.decoder.layers.0.fc1"])
    fewer = count_trainable(mini)
    assert fewer["vision"] == (0, counts["vision"][1])
    fc1 = mini.language_model.decoder.layers[0].fc1
    assert fewer["decoder"] == (counts["decoder"][0] - fc1.weight.numel() - fc1.bias.numel(), counts["decoder"][1])
    assert {name: fewer[name] for name in ("projection", "encoder", "embeddings")} == {
        name: counts[name] for name in ("projection", "encoder", "embeddings")
    }


def test_a_frozen_part_drops_nothing(mini: Florence2Model, batch: Batch) -> None:
    """A frozen tower gives the same features every time; one that learns does not."""
    freeze(mini, ["vision"])
    assert not any(module.training for module in mini.vision_tower.modules())
    assert mini.training and mini.language_model.decoder.training and mini.language_model.encoder.layers[0].training
    once, again = (mini.encode_image(batch.pixel_values) for _ in range(2))
    assert torch.equal(once, again)
    freeze(mini, ["encoder"])
    memories = [mini.encode(once[:1], batch.input_ids[:1]) for _ in range(2)]
    assert torch.equal(*memories)
    mini.vision_tower.requires_grad_(True)
    set_training(mini)
    assert not torch.equal(mini.encode_image(batch.pixel_values), mini.encode_image(batch.pixel_values))


def test_evaluation_in_between_is_undone(mini: Florence2Model) -> None:
    freeze(mini, ["projection", "decoder"])
    modes = {name: module.training for name, module in mini.named_modules()}
    mini.eval()
    set_training(mini)
    assert {name: module.training for name, module in mini.named_modules()} == modes
    assert len(set(modes.values())) == 2


def test_a_part_that_does_not_exist_is_refused(mini: Florence2Model) -> None:
    with pytest.raises(ConfigError, match="Unknown part to freeze: 'visoin'. Known parts: vision, projection"):
        freeze(mini, ["visoin"])


def test_nothing_left_to_train_is_refused(mini: Florence2Model) -> None:
    with pytest.raises(ConfigError, match="vision, projection, language frozen, nothing is left"):
        freeze(mini, ["vision", "projection", "language"])
