"""Tokens of two implementations, counted as equal, tied or different.

Where two answers are equally probable up to rounding, processors, thread counts and implementations choose differently,
and neither choice is wrong. Such ties are told by this project's own scores and counted apart from differences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from florence2.model.florence2 import Florence2Model

TIE = 1e-6
"""Two scores are tied when they differ by at most this part of the larger one."""


@dataclass
class TokenCount:
    """Answers compared so far: token for token equal, tied, and all."""

    equal: int = 0
    ties: int = 0
    total: int = 0

    def add(
        self,
        model: Florence2Model,
        encode: Callable[[], Tensor],
        ours: Sequence[Sequence[int]],
        theirs: Sequence[Sequence[int]],
    ) -> bool:
        """Count one answer of one or more returned rows; return whether it is equal.

        Args:
            model: what answered.
            encode: returns the memory (1, S, D) that it answered from; called only where the answers differ.
            ours: ids of each row, from the start id on; padding does not count.
            theirs: the reference's ids of the same rows.
        """
        pad = model.config.text.pad_token_id
        pairs = [(strip(mine, pad), strip(other, pad)) for mine, other in zip(ours, theirs, strict=True)]
        apart = [(mine, other) for mine, other in pairs if mine != other]
        self.total += 1
        self.equal += not apart
        self.ties += bool(apart) and all(is_tie(model, encode, mine, other) for mine, other in apart)
        return not apart


def strip(ids: Sequence[int], pad: int) -> list[int]:
    """Return ids without the padding at their end."""
    end = next((i for i in range(len(ids), 0, -1) if ids[i - 1] != pad), 0)
    return list(ids[:end])


@torch.no_grad()
def is_tie(model: Florence2Model, encode: Callable[[], Tensor], ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Return whether two different answers to the memory (1, S, D) of `encode` have equal scores up to rounding.

    Either the two tokens where the answers part have tied logits, as in a greedy search, or the summed
    log-probabilities of the two are tied at a length from there on, as where a search with beams drops one of them.
    """
    parting = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if parting is None:  # one begins the other, so a choice between going on and ending differs
        return False
    memory = encode()
    logits = model.decode(torch.tensor([ours[:parting]], device=memory.device), memory)[0, -1].double()
    if _are_tied(float(logits[ours[parting]]), float(logits[theirs[parting]])):
        return True
    sums = [running_sums(model, memory, ids) for ids in (ours, theirs)]
    return any(_are_tied(a, b) for a, b in list(zip(*sums, strict=False))[parting - 1 :])


def running_sums(model: Florence2Model, memory: Tensor, ids: Sequence[int]) -> list[float]:
    """Return the summed log-probabilities of `ids` up to each of them, the start id not counted."""
    labels = torch.tensor([ids], device=memory.device)
    logits = model.decode(labels[:, :-1], memory)[0].double()  # (T, V)
    chosen = logits.log_softmax(dim=-1).gather(1, labels[0, 1:, None])[:, 0]
    return [float(total) for total in chosen.cumsum(dim=0)]


def _are_tied(a: float, b: float) -> bool:
    return abs(a - b) <= TIE * max(abs(a), abs(b))
