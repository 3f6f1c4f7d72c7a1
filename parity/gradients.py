"""Compare loss and gradients of a live reference and this project on one batch, without dropout and with it."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from florence2.checkpoints.checkpoint import load_model
from florence2.checkpoints.layouts import SHARED, TIED_TO_SHARED, TRANSPOSED, to_canonical
from florence2.model.config import Florence2Config
from florence2.model.florence2 import IGNORED_LABEL, Florence2Model
from parity.cases import shapes
from parity.recipe import make_checkpoint
from parity.references import Native, Reference
from parity.report import Comparison, largest_difference

RATES = ("drop_path_rate", "dropout", "attention_dropout", "activation_dropout")
RATE = 0.3
LIMIT = 4.0
"""The most standard errors by which two samples of one distribution may differ; one pair in 16,000 exceeds it."""

_LABELS = ([0, 713, 16, 10, 50286, 11, 5, 2], [0, 9, IGNORED_LABEL, 50290, 51268, 2], [0, 2])
_Loss = Callable[[], Tensor]


class TrainingBatch(NamedTuple):
    """The arguments of `Florence2Model.loss`."""

    pixel_values: Tensor
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor


def make_batch(pixels: Sequence[Tensor], prompts: Sequence[list[int]], padded: bool = True) -> TrainingBatch:
    """Make a batch of three images with answers of three lengths, one with a gap; `padded` prompts differ in length."""
    chosen = [prompts[0], prompts[-1], prompts[1 % len(prompts)]] if padded else [prompts[-1]] * 3
    width = max(map(len, chosen))
    return TrainingBatch(
        torch.cat([pixels[i % len(pixels)] for i in range(3)]),
        torch.tensor([ids + [1] * (width - len(ids)) for ids in chosen]),
        torch.tensor([labels + [IGNORED_LABEL] * (8 - len(labels)) for labels in _LABELS]),
        torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in chosen]),
    )


def compare_gradients(
    group: str, subject: str, ours: Florence2Model, reference: Reference, batch: TrainingBatch
) -> Iterator[Comparison]:
    """Compare without dropout, and in float32 with the native model also with it, on the same random draws.

    Both draw from torch's generator in the same order and shapes, so with one seed they drop the same values. (The
    remote code draws its stochastic depth differently.)
    """
    kind = str(ours.dtype).removeprefix("torch.")
    yield from _compare(group, subject, ours, reference, batch, kind)
    if isinstance(reference, Native) and ours.dtype == torch.float32:
        with in_training(ours), in_training(reference.model):
            yield from _compare(group, subject, ours, reference, batch, f"{kind}, with dropout")


def _compare(
    group: str, subject: str, ours: Florence2Model, reference: Reference, batch: TrainingBatch, kind: str
) -> Iterator[Comparison]:
    torch.manual_seed(1)
    loss = ours.loss(*batch)
    torch.manual_seed(1)
    expected = reference.batch_loss(*batch)
    difference = largest_difference(loss.detach(), expected.detach())
    yield Comparison(group, subject, f"loss of a batch, {kind}", len(batch.labels), len(batch.labels), difference)
    mine = gradients(ours, loss)
    theirs = to_canonical_gradients(gradients(reference.model, expected), reference)
    apart = {name: relative_difference(name, mine, theirs) for name in mine.keys() & theirs.keys()}
    worst = max(apart, key=apart.__getitem__)
    total = len(mine.keys() | theirs.keys())
    note = f"({worst})" if apart[worst] > 1e-4 else ""
    yield Comparison(group, subject, f"gradients, relative, {kind}", len(apart), total, apart[worst], note)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every parameter that `loss` depends on, by the model's own names."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: value for name, value in zip(parameters, values, strict=True) if value is not None}


def to_canonical_gradients(theirs: dict[str, Tensor], reference: Reference) -> dict[str, Tensor]:
    """Rename a reference's gradients to canonical names, and transpose them to our tensors' orientation.

    Where it holds the token embedding more than once (the remote code keeps a copy as the output projection), the
    gradient of the tied embedding is the sum.
    """
    layout = reference.layout
    named: dict[str, Tensor] = {}
    for their_name, value in theirs.items():
        name = to_canonical(their_name, layout) or their_name
        value = value.T if name in TRANSPOSED[layout] else value
        name = SHARED if name in TIED_TO_SHARED else name
        named[name] = named[name] + value if name in named else value
    return named


def relative_difference(name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return |ours - theirs| / |theirs| in the Euclidean norm, over the rows that both have.

    A key's bias adds the same to all scores of a query, which the softmax ignores. Its gradient is zero up to rounding,
    so it is compared with the norm of the gradient of the key's weight.
    """
    mine, expected = ours[name], theirs[name]
    expected = expected[: len(mine)]  # a converted embedding has extra rows
    if torch.equal(mine, expected):
        return 0.0
    scale = theirs[name.replace("k_proj.bias", "k_proj.weight")].norm()
    return float((mine - expected).norm() / scale)


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Turn on dropout and stochastic depth within the block."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def compare_dropout(
    group: str, make_native: Callable[[Path, Florence2Model, torch.dtype], Reference], draws: int = 250
) -> Iterator[Comparison]:
    """Compare mean and variance of the loss with each kind of dropout alone, over different seeds on each side."""
    shape = shapes()[3]
    apart: list[float] = []
    for name in RATES:
        with tempfile.TemporaryDirectory() as scratch:
            make_checkpoint(Path(scratch), with_only(shape.config, name, RATE), shape.seed, 0.0, shape.size)
            ours = load_model(Path(scratch))
            reference = make_native(Path(scratch), ours, torch.float32)
        batch = _small_batch()
        mine = draw_losses(ours, lambda: ours.loss(*batch), range(draws))  # noqa: B023  called at once
        theirs = draw_losses(reference.model, lambda: reference.batch_loss(*batch), range(draws, 2 * draws))  # noqa: B023
        apart += standard_errors_apart(mine, theirs)
    equal = sum(distance < LIMIT for distance in apart)
    note = f"(at most {max(apart):.1f} standard errors apart, of {LIMIT:.0f})"
    subject = f"{shape.name} / {reference.name}"
    yield Comparison(group, subject, "loss with dropout, mean and variance", equal, len(apart), note=note)


def _small_batch() -> TrainingBatch:
    """Make a batch of one 64 x 64 image four times: the random draws must differ between rows."""
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    prompt, labels = torch.tensor([[0, 9, 11, 2]] * 4), torch.tensor([[0, 713, 50286, 2]] * 4)
    return TrainingBatch(pixels, prompt, labels, torch.ones_like(prompt))


def with_only(config: Florence2Config, name: str, rate: float) -> Florence2Config:
    """Return `config` with one of RATES at `rate` and the others at zero."""
    rates: dict[str, Any] = dict.fromkeys(RATES, 0.0) | {name: rate}
    vision = replace(config.vision, drop_path_rate=rates.pop("drop_path_rate"))
    return replace(config, vision=vision, text=replace(config.text, **rates))


def draw_losses(model: nn.Module, loss: _Loss, seeds: Iterable[int]) -> np.ndarray:
    """Compute the loss in training mode, once for each seed."""
    losses = []
    with torch.no_grad(), in_training(model):
        for seed in seeds:
            torch.manual_seed(seed)
            losses.append(float(loss()))
    return np.array(losses)


def standard_errors_apart(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return by how many standard errors the means of two samples differ, and their variances."""
    variances = [x.var(ddof=1) for x in (one, other)]
    of_mean = sum(v / len(x) for v, x in zip(variances, (one, other), strict=True))
    # the variance of a sample variance, by the fourth moment: losses are not normally distributed
    of_variance = sum((((x - x.mean()) ** 4).mean() - x.var() ** 2) / len(x) for x in (one, other))
    return (
        float(abs(one.mean() - other.mean()) / of_mean**0.5),
        float(abs(variances[0] - variances[1]) / of_variance**0.5),
    )
