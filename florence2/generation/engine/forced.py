"""A second reading of finished answers by teacher forcing: the model's own probabilities along them.

The search sees one beam after another, by steps, under rules. Here every answer is read in one pass of the decoder, so
its probabilities are the same whatever search, batch or step wrote it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from florence2.generation.state import Generation
from florence2.model.florence2 import Florence2Model

_ROWS = 8  # answers that are read together
_POSITIONS = 64  # whose logits (V) exist at one moment


def read_again(
    model: Florence2Model, finished: Sequence[tuple[Generation, Tensor]], locations: Sequence[int]
) -> list[Generation]:
    """Return generations with their `forced_logprobs` and `location_probabilities`, computed without gradients.

    Each is of one input and comes with its memory (1, S, D); several are read side by side. `locations` are the ids of
    the location tokens.
    """
    rows = [(ids, memory[0]) for generation, memory in finished for ids in generation.sequences]
    read: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        location_ids = torch.tensor(locations, device=model.device)
        for start in range(0, len(rows), _ROWS):
            read += _read_padded(model, rows[start : start + _ROWS], location_ids)
    coming, results = iter(read), []
    for generation, _ in finished:
        logprobs, probabilities = map(
            torch.stack, zip(*itertools.islice(coming, len(generation.sequences)), strict=True)
        )
        results.append(replace(generation, forced_logprobs=logprobs, location_probabilities=probabilities))
    return results


def _read_padded(
    model: Florence2Model, rows: Sequence[tuple[Tensor, Tensor]], locations: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read sequences (1 + T,) over memories (S, D) of other lengths; yield (T,) and (T, bins) of each."""
    sequences, memories = [ids for ids, _ in rows], [memory for _, memory in rows]
    lengths, mask = [len(memory) for memory in memories], None
    if min(lengths) < max(lengths):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (R, S)
        mask = mask.to(locations.device)
    # what stands after the end of an answer changes nothing before it, so that any id may fill the rest
    ids, memory = pad_sequence(sequences, batch_first=True), pad_sequence(memories, batch_first=True)
    logprobs, probabilities = _read(model, ids, memory, mask, locations)
    for row, own in enumerate(sequences):
        yield logprobs[row, : len(own) - 1], probabilities[row, : len(own) - 1]


def _read(
    model: Florence2Model, sequences: Tensor, memory: Tensor, mask: Tensor | None, locations: Tensor
) -> tuple[Tensor, Tensor]:
    """Read sequences (R, 1 + T); return log-probabilities (R, T) and the locations' probabilities (R, T, bins)."""
    language, read, written = model.language_model, sequences[:, :-1], sequences[:, 1:]
    hidden = language.decoder(language.embed_answer(read), memory, mask)  # (R, T, D)
    size = max(1, _POSITIONS // len(sequences))  # few at a time, because the vocabulary is large
    logprobs, probabilities = [], []
    for part, ids in zip(torch.split(hidden, size, dim=1), torch.split(written, size, dim=1), strict=True):
        logits = model.logits(part).float()
        total = logits.logsumexp(dim=-1, keepdim=True)
        logprobs.append((logits.gather(2, ids[:, :, None]) - total)[:, :, 0])
        probabilities.append((logits[:, :, locations] - total).exp())
    return torch.cat(logprobs, dim=1), torch.cat(probabilities, dim=1)
