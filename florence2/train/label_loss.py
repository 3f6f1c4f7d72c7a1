"""The loss of `Florence2Model.answer_loss` with less memory and less padding, and the same numbers up to rounding.

Three things differ from the plain line in `model.florence2`: logits are computed only where a label counts; they are
computed in chunks that are turned into gradients at once, so that they never exist as a whole; and prompts and answers
of very different lengths are computed apart (`grouping`), so that short ones are not padded to the longest. For 32
answers of 100 ids and base's 51,289 tokens the plain line holds 1.3 GB of logits and their gradients, this one 0.13 GB.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.fast.install import FastFlorence2Model
from florence2.fast.unchanged import find_replaced_method, remember
from florence2.model.florence2 import IGNORED_LABEL, Florence2Model
from florence2.train.grouping import group_rows

CHUNK = 1 << 24
"""Logits computed at once: 64 MiB in float32, enough rows for matrix products to run at full speed."""
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
    prompts, answers = _lengths(attention_mask != 0), _lengths(labels != IGNORED_LABEL)
    parts = []
    for group in group_rows(prompts, answers, features.shape[1]):
        width = max(prompts[row] for row in group.rows)
        memory, mask = _encode(model, features, input_ids[:, :width], attention_mask[:, :width], group.rows)
        places = {row: place for place, row in enumerate(group.rows)}
        for rows in map(sorted, group.answers):
            chosen = [places[row] for row in rows]
            own = _take(labels, rows)[:, : max(answers[row] for row in rows)]
            parts.append(_decode(model, _take(memory, chosen), own, None if mask is None else _take(mask, chosen)))
    hidden, kept = (torch.cat(part) for part in zip(*parts, strict=True))  # (L, D), (L,)
    return label_loss(hidden, model.output_weight, model.final_logits_bias[0], kept)


def _is_plain(model: Florence2Model) -> bool:
    """Return whether the loss of `model` is that of `Florence2Model`, as far as one can tell from its methods."""
    return type(model) in _KNOWN and find_replaced_method(_KNOWN) is None and _METHODS.isdisjoint(vars(model))


def _lengths(counted: Tensor) -> list[int]:
    """Return the number of positions of each row (E, T) up to the last that is `counted`; at least 1."""
    positions = torch.arange(1, counted.shape[1] + 1, device=counted.device)
    lengths: list[int] = (counted * positions).amax(1).clamp(min=1).tolist()
    return lengths


def _encode(
    model: Florence2Model, features: Tensor, input_ids: Tensor, attention_mask: Tensor, rows: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Return the memory (G, N + S, D) of some rows and its mask, None where nothing is padding."""
    features, input_ids, attention_mask = (_take(each, rows) for each in (features, input_ids, attention_mask))
    mask = None if attention_mask.all() else attention_mask  # without a mask torch has faster attention
    memory = model.encode(features, input_ids, mask)
    return memory, None if mask is None else model.memory_mask(features, mask)


def _take(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows, in ascending order; all of them are not copied."""
    return value if len(rows) == len(value) else value[torch.tensor(rows, device=value.device)]


def _decode(model: Florence2Model, memory: Tensor, labels: Tensor, memory_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the hidden states (L, D) where a label counts, and these labels (L,)."""
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
