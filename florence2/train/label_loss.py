"""The loss of `Florence2Model.answer_loss` with less memory and less padding, and the same numbers up to rounding.

Three things differ from the plain line in `model.florence2`: logits are computed only where a label counts; they are
computed in chunks that are turned into gradients at once, so that they never exist as a whole; and answers of very
different lengths are decoded apart, so that short ones are not padded to the longest. For 32 answers of 100 ids and
base's 51,289 tokens the plain line holds 1.3 GB of logits and their gradients, this one 0.13 GB.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.fast.install import FastFlorence2Model
from florence2.fast.unchanged import find_replaced_method, remember
from florence2.model.florence2 import IGNORED_LABEL, Florence2Model

CHUNK = 1 << 24
"""Logits computed at once: 64 MiB in float32, enough rows for matrix products to run at full speed."""
PADDING = 0.1
"""The largest share of padding among the positions of memory and answers, while answers can still be split."""
_KNOWN = remember(frozenset((Florence2Model, FastFlorence2Model)))
_METHODS = frozenset(("answer_loss", "memory_loss", "encode", "memory_mask", "decode", "logits", "output_weight"))


def answer_loss(
    model: Florence2Model, features: Tensor, input_ids: Tensor, labels: Tensor, attention_mask: Tensor
) -> Tensor:
    """Return the summed cross-entropy of `labels` (E, T) on image tokens (E, N, D), a scalar.

    A model whose methods were replaced, or a model of another class, computes its own loss.
    """
    if not _is_plain(model):
        return model.answer_loss(features, input_ids, labels, attention_mask, reduction="sum")
    mask = None if attention_mask.all() else attention_mask  # without a mask torch has faster attention
    memory = model.encode(features, input_ids, mask)  # (E, N + S, D)
    memory_mask = None if mask is None else model.memory_mask(features, mask)
    lengths = _lengths(labels)
    groups = split_rows(lengths, memory.shape[0] * memory.shape[1])
    parts = [_decode(model, memory, labels, memory_mask, rows, lengths[rows[0]]) for rows in groups]
    hidden, kept = (torch.cat(part) for part in zip(*parts, strict=True))  # (L, D), (L,)
    return label_loss(hidden, model.output_weight, model.final_logits_bias[0], kept)


def _is_plain(model: Florence2Model) -> bool:
    """Return whether the loss of `model` is that of `Florence2Model`, as far as one can tell from its methods."""
    return type(model) in _KNOWN and find_replaced_method(_KNOWN) is None and _METHODS.isdisjoint(vars(model))


def _lengths(labels: Tensor) -> list[int]:
    """Return the number of positions of each row of labels (E, T) up to the last that counts; at least 1."""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    lengths: list[int] = ((labels != IGNORED_LABEL) * positions).amax(1).clamp(min=1).tolist()
    return lengths


def split_rows(lengths: Sequence[int], others: int = 0) -> list[list[int]]:
    """Split rows by length, so that padding is at most PADDING of all positions, `others` included.

    Args:
        lengths: The number of positions of each row.
        others: Positions that are computed besides these, such as those of the memory.

    Returns:
        The rows of each group, as few groups as splits at the best place give; one group where that suffices.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups = [rows]
    while True:
        computed = sum(len(group) * lengths[group[0]] for group in groups)
        if computed - sum(lengths) <= PADDING * (computed + others):
            return groups
        saved, index, place = max(_best_split(lengths, group, index) for index, group in enumerate(groups))
        assert saved > 0, "padding is left only where lengths differ"
        groups[index : index + 1] = [groups[index][:place], groups[index][place:]]


def count_positions(prompts: Sequence[int], answers: Sequence[int], image_tokens: int) -> tuple[int, int]:
    """Return how many positions the text model computes for a micro-batch, and how many of them are padding.

    `prompts` and `answers` are the lengths of each pair; every pair has `image_tokens` in addition.
    """
    memory = len(prompts) * (image_tokens + max(prompts))
    computed = sum(len(group) * answers[group[0]] for group in split_rows(answers, memory))
    real = len(prompts) * image_tokens + sum(prompts) + sum(answers)
    return memory + computed, memory + computed - real


def _best_split(lengths: Sequence[int], group: Sequence[int], index: int) -> tuple[int, int, int]:
    """Return (positions saved, index, place) of the best place to split a group, whose longest row is the first."""
    longest, count = lengths[group[0]], len(group)
    return max((((longest - lengths[row]) * (count - place), index, place) for place, row in enumerate(group)))


def _decode(
    model: Florence2Model, memory: Tensor, labels: Tensor, memory_mask: Tensor | None, rows: Sequence[int], width: int
) -> tuple[Tensor, Tensor]:
    """Return the hidden states (L, D) of some rows where a label counts, and these labels (L,)."""
    if len(rows) < len(labels):
        index = torch.tensor(rows, device=labels.device)
        memory, labels = memory[index], labels[index]
        memory_mask = None if memory_mask is None else memory_mask[index]
    labels = labels[:, :width]
    text, language = model.config.text, model.language_model
    shifted = F.pad(labels[:, :-1], (1, 0), value=text.decoder_start_token_id)
    shifted = shifted.masked_fill(shifted == IGNORED_LABEL, text.pad_token_id)
    hidden = language.decoder(language.embed_answer(shifted), memory, memory_mask)  # (G, T, D)
    counted = labels != IGNORED_LABEL
    return hidden[counted], labels[counted]


def label_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of `labels` (L,), a scalar.

    `hidden` (L, D); `weight` (V, D) and `bias` (V,) of the output projection. Under autocast the products are computed
    in its type, and the rest in float32 as in `Florence2Model.logits`.
    """
    # inside a Function gradients are always off
    loss: Tensor = _LabelLoss.apply(hidden, weight, bias, labels, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


class _LabelLoss(torch.autograd.Function):
    """Cross-entropy whose gradients are computed with it, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, learns: bool) -> Tensor:
        device = hidden.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wants = (learns and ctx.needs_input_grad[0], learns and ctx.needs_input_grad[1])
        with torch.autocast(device, enabled=False):  # cast once here, not in every chunk
            loss, *gradients = _loss_and_gradients(hidden, hidden.to(half), weight, bias, labels, wants)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # in place: the gradient of the weight is as large as the weight, and nothing else holds it
        hidden, weight = (None if each is None else each.mul_(scale) for each in ctx.saved_tensors)
        return hidden, weight, None, None, None


def _loss_and_gradients(
    hidden: Tensor, cast: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss and the gradients of `hidden` and `weight` that are wanted; `cast` is `hidden` for products."""
    wide = torch.promote_types(cast.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    to_hidden = torch.empty_like(hidden) if wants[0] else None
    to_weight = torch.zeros_like(weight) if wants[1] else None
    half_weight, half_bias = weight.to(cast.dtype), bias.to(cast.dtype)
    step = max(1, CHUNK // len(weight))
    for start in range(0, len(labels), step):
        rows, chosen = cast[start : start + step], labels[start : start + step, None]
        logits = F.linear(rows, half_weight, half_bias).to(wide)  # (l, V)
        normaliser = logits.logsumexp(1, keepdim=True)
        loss += (normaliser - logits.gather(1, chosen)).sum()
        if to_hidden is None and to_weight is None:
            continue
        # the gradient of the logits, in their place: softmax minus one at the label
        slope = logits.sub_(normaliser).exp_()
        slope.scatter_add_(1, chosen, slope.new_full((), -1.0).expand_as(chosen))
        slope = slope.to(cast.dtype)
        if to_hidden is not None:
            to_hidden[start : start + step] = slope @ half_weight
        if to_weight is not None:
            _add_product(to_weight, slope, rows)
    return loss, to_hidden, to_weight


def _add_product(total: Tensor, slope: Tensor, rows: Tensor) -> None:
    """Add slope (l, V) and rows (l, D) to total (V, D): total += slope.T @ rows."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, rows)
    else:
        total += slope.T @ rows
