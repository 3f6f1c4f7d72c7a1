"""What the tests of the loss share: samples, and one backward pass."""

import torch
from torch import Tensor

from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train.data import Batch, make_batch
from florence2.train.loss import LossModule
from florence2.train.samples import Sample
from parity.recipe import make_picture

SAMPLES = [
    Sample(
        make_picture(1, 90, 70),
        (("<CAPTION>", "a red circle"), ("<OD>", "circle<loc_10><loc_20><loc_500><loc_600>")),
    ),
    Sample(make_picture(2, 64, 100), (("<OCR>", "A"),)),
    Sample(
        make_picture(3, 120, 80),
        (
            ("<CAPTION_TO_PHRASE_GROUNDING>a blue square and a star", "a star<loc_1><loc_2><loc_3><loc_4>"),
            ("<MORE_DETAILED_CAPTION>", "There is a large blue square beside a small yellow star."),
            ("<CAPTION>", "two shapes"),
        ),
    ),
]
"""Prompts and answers of many lengths; one, two and three questions about an image."""


def batch_of(processor: Processor, samples: list[Sample] | None = None) -> Batch:
    """One batch of them all, or of `samples`."""
    return make_batch(SAMPLES if samples is None else samples, processor, 1024)


def backward(model: Florence2Model, batch: Batch, autocast: bool = False) -> tuple[float, dict[str, Tensor]]:
    """The summed loss, and the gradient of every parameter that got one; `autocast` is to bfloat16."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = LossModule(model)(batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], within: float = 1e-10) -> bool:
    """Whether the same parameters got gradients that differ by less than `within` of the largest entry."""
    if found.keys() != expected.keys():
        return False
    scale = max(float(value.abs().max()) for value in expected.values())
    return all(torch.allclose(found[name], expected[name], rtol=0, atol=within * scale) for name in expected)


def added(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of several batches, summed."""
    return {name: sum(each[name] for each in gradients) for name in gradients[0]}
