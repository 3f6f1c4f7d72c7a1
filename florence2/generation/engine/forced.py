"""A second reading of finished answers by teacher forcing: the model's own probabilities along them.

The search sees one beam after another, by steps, under rules. Here every answer is read in one pass of the decoder, so
its probabilities are the same whatever search, batch or step wrote it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from florence2.generation.state import Generation
from florence2.model.florence2 import Florence2Model

_ROWS = 8  # answers that are read together
_POSITIONS = 64  # whose logits (V) exist at one moment


def read_again(
    model: Florence2Model,
    generation: Generation,
    memory: Tensor,
    locations: Sequence[int],
    memory_mask: Tensor | None = None,
) -> Generation:
    """Return `generation` with its `forced_logprobs` and `location_probabilities`, computed without gradients.

    `memory` (B, S, D) and its mask (B, S) are those of the B inputs; `locations` the ids of the location tokens.
    """
    each = len(generation.sequences) // len(memory)
    ids, owners = torch.tensor(locations, device=memory.device), torch.arange(len(memory), device=memory.device)
    owners = owners.repeat_interleave(each)
    parts = []
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(owners), device=memory.device), _ROWS):
            own = owners[rows]
            mask = None if memory_mask is None else memory_mask[own]
            parts.append(_read(model, generation.sequences[rows], memory[own], mask, ids))
    logprobs, probabilities = (torch.cat(column) for column in zip(*parts, strict=True))
    return replace(generation, forced_logprobs=logprobs, location_probabilities=probabilities)


def _read(
    model: Florence2Model, sequences: Tensor, memory: Tensor, mask: Tensor | None, locations: Tensor
) -> tuple[Tensor, Tensor]:
    """Read sequences (R, 1 + T); return log-probabilities (R, T) and the locations' probabilities (R, T, bins)."""
    language, read, written = model.language_model, sequences[:, :-1], sequences[:, 1:]
    mask = None if mask is None else mask.bool()
    hidden = language.decoder(language.embed_answer(read), memory, mask)  # (R, T, D)
    size = max(1, _POSITIONS // len(sequences))  # few at a time, because the vocabulary is large
    logprobs, probabilities = [], []
    for part, ids in zip(torch.split(hidden, size, dim=1), torch.split(written, size, dim=1), strict=True):
        logits = model.logits(part).float()
        total = logits.logsumexp(dim=-1, keepdim=True)
        logprobs.append((logits.gather(2, ids[:, :, None]) - total)[:, :, 0])
        probabilities.append((logits[:, :, locations] - total).exp())
    return torch.cat(logprobs, dim=1), torch.cat(probabilities, dim=1)
