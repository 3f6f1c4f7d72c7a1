"""The comparison of gradients passes equal models and notices common mistakes in training."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from florence2.model.config import Florence2Config
from florence2.model.davit import _Block
from florence2.model.florence2 import Florence2Model
from parity.cases import shapes
from parity.gradients import (
    LIMIT,
    RATE,
    RATES,
    TrainingBatch,
    compare_gradients,
    draw_losses,
    make_batch,
    standard_errors_apart,
    with_only,
)
from parity.recipe import make_model
from parity.report import HEADROOM, load_tolerances
from tests.release import keep

PROMPTS = [[0, 11, 2], [0, 9, 7, 8, 12, 2]]


class Ours:
    """This project in the place of the reference: eager attention, native names."""

    name, layout, attends_to_padding = "itself", "native", False

    def __init__(self, model: Florence2Model):
        self.model = nn.Module()
        self.model.model = model

    def batch_loss(self, *batch: Tensor) -> Tensor:
        loss: Tensor = self.model.model.loss(*batch)
        return loss


Pair = tuple[Florence2Model, Ours]


@pytest.fixture(scope="module")
def config() -> Florence2Config:
    return shapes()[3].config


@pytest.fixture(scope="module")
def models(config: Florence2Config) -> tuple[Florence2Model, Florence2Model]:
    ours = make_model(config, 1, 0.0).double()
    other = Florence2Model(config, attention="eager").double().eval()
    other.load_state_dict(ours.state_dict())
    return ours, other


@pytest.fixture
def pair(models: tuple[Florence2Model, Florence2Model]) -> Iterator[Pair]:
    yield models[0], Ours(models[1])
    models[0].requires_grad_(True)


@pytest.fixture(scope="module")
def batch() -> TrainingBatch:
    generator = torch.Generator().manual_seed(2)
    return make_batch([torch.randn(1, 3, 64, 64, generator=generator) for _ in range(2)], PROMPTS)


def agrees(ours: Florence2Model, reference: Any, batch: TrainingBatch) -> bool:
    rows = list(compare_gradients("test", "tiny", ours, reference, batch))
    assert [row.stage for row in rows] == ["loss of a batch, float64", "gradients, relative, float64"]
    return all(row.passes({row.key: 1e-10}) for row in rows)


def test_the_batch_has_padding_of_every_kind(batch: TrainingBatch) -> None:
    assert batch.attention_mask.sum(1).tolist() == [3, 6, 6]
    assert (batch.labels != -100).sum(1).tolist() == [8, 5, 2]
    assert batch.labels[1, 2] == -100 and batch.labels[1, 3] != -100
    assert torch.equal(batch.pixel_values[0], batch.pixel_values[2])
    assert make_batch([batch.pixel_values[:1]], PROMPTS, padded=False).attention_mask.all()


def test_equal_models_agree(pair: Pair, batch: TrainingBatch) -> None:
    assert agrees(pair[0], pair[1], batch)


def on_padding(model: Florence2Model, batch: TrainingBatch) -> Tensor:
    return model.loss(*batch._replace(labels=batch.labels.masked_fill(batch.labels == -100, 1)))


def without_mask(model: Florence2Model, batch: TrainingBatch) -> Tensor:
    return model.loss(*batch._replace(attention_mask=torch.ones_like(batch.attention_mask)))


def mean_of_means(model: Florence2Model, batch: TrainingBatch) -> Tensor:
    return torch.stack([model.loss(*(value[i : i + 1] for value in batch)) for i in range(3)]).mean()


def without_shift(model: Florence2Model, batch: TrainingBatch) -> Tensor:
    return model.loss(*batch._replace(labels=batch.labels.roll(1, dims=1)))


def through_no_picture(model: Florence2Model, batch: TrainingBatch) -> Tensor:
    with torch.no_grad():
        features = model.encode_image(batch.pixel_values)
    return model.answer_loss(features, *batch[1:])


@pytest.mark.release
@pytest.mark.parametrize("change", [on_padding, without_mask, mean_of_means, without_shift, through_no_picture])
def test_what_goes_wrong_in_training_is_noticed(
    pair: Pair, batch: TrainingBatch, change: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, reference = pair
    wrong = lambda *batch: change(reference.model.model, TrainingBatch(*batch))  # noqa: E731
    monkeypatch.setattr(reference, "batch_loss", wrong)
    assert not agrees(ours, reference, batch)


@pytest.mark.parametrize("part", ["language_model.decoder.embed_positions", "vision_tower.convs.0"])
def test_a_frozen_part_is_noticed(pair: Pair, batch: TrainingBatch, part: str) -> None:
    pair[0].get_submodule(part).requires_grad_(False)
    assert not agrees(pair[0], pair[1], batch)


@pytest.mark.parametrize(
    "name",
    keep(
        [0, 2],
        [
            "vision_tower.blocks.0.0.channel_block.norm2.bias",
            "multi_modal_projector.image_position_embed.row_embeddings.weight",
            "language_model.encoder.layers.0.self_attn.k_proj.bias",
            "language_model.shared.weight",
        ],
    ),
)
def test_one_gradient_that_is_off_by_a_thousandth_is_noticed(pair: Pair, batch: TrainingBatch, name: str) -> None:
    """The gradient of a key's bias is zero; there a thousandth of its weight's is added."""
    ours, parameters = pair[0], dict(pair[0].named_parameters())
    change: Callable[[Tensor], Tensor] = lambda grad: grad * 1.001  # noqa: E731
    if name.endswith("k_proj.bias"):
        weight = torch.autograd.grad(ours.loss(*batch), parameters[name.replace("bias", "weight")])[0]
        change = lambda grad: grad + 1e-3 * weight.norm()  # noqa: E731
    with parameters[name].register_hook(change):
        assert not agrees(pair[0], pair[1], batch)


def test_tolerances_are_within_what_is_asked() -> None:
    """A loss to 1e-5 and every gradient to 1e-4 of its norm, before the headroom.

    In float32 a gradient that is 1/20,000 of the largest is known to three digits only, on either side.
    """
    tolerances = load_tolerances()
    for kind, limit in (("float64", 1e-4), ("float32", 1e-3), ("float32, with dropout", 1e-3)):
        assert 0 < tolerances[f"native: loss of a batch, {kind}"] <= HEADROOM * 1e-5
        assert 0 < tolerances[f"native: gradients, relative, {kind}"] <= HEADROOM * limit


# ---- distributions -------------------------------------------------------------------------------------------------


def test_standard_errors() -> None:
    rng = np.random.default_rng(0)
    same = [standard_errors_apart(rng.exponential(size=400), rng.exponential(size=500)) for _ in range(300)]
    assert all(0.8 < (np.array(same)[:, i] ** 2).mean() ** 0.5 < 1.3 for i in (0, 1))
    one = rng.normal(size=400)
    assert standard_errors_apart(one, one + 1)[0] > 10 and standard_errors_apart(one, one * 2)[1] > 5


def losses(config: Florence2Config, seeds: range) -> np.ndarray:
    """Under stochastic depth, of one image eight times."""
    little = with_only(replace(config, text=replace(config.text, vocab_size=60)), "drop_path_rate", RATE)
    model = make_model(little, 1, 0.0)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1, -1)
    ids = torch.tensor([[0, 9, 11, 2]] * 8)
    return draw_losses(model, lambda: model.loss(pixels, ids, ids), seeds)


def drop_together(self: _Block, branch: Tensor) -> Tensor:
    """For all images of the batch at once, as stochastic depth must not."""
    if not self.training or self.drop_path_rate == 0.0:
        return branch
    return branch * (torch.rand(()) >= self.drop_path_rate) / (1.0 - self.drop_path_rate)


@pytest.mark.release  # 450 losses
def test_another_distribution_is_noticed(config: Florence2Config, monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses(config, range(150))
    assert max(standard_errors_apart(right, losses(config, range(150, 300)))) < LIMIT
    monkeypatch.setattr(_Block, "_drop_path", drop_together)
    assert standard_errors_apart(right, losses(config, range(300, 450)))[1] > LIMIT


def test_each_kind_of_dropout_is_alone() -> None:
    config = shapes()[3].config
    for name in RATES:
        changed = with_only(config, name, RATE)
        rates = {rate: getattr(changed.vision if rate == "drop_path_rate" else changed.text, rate) for rate in RATES}
        assert rates == dict.fromkeys(RATES, 0.0) | {name: RATE}
