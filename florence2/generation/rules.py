"""The rules of the logits: each changes the scores of the next id, given the sequence so far.

Dimensions: R sequences, L ids that each has room for (the room grows with the answer), V vocabulary. `Rule` says what a
rule is given. The rules of this file look at each row's own number of ids on its device, and leave alone the rows that
they do not apply to: one recorded step serves rows at any step (`fast.cuda`).
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

_NEVER = float("-inf")


class Rule(Protocol):
    """A change of the scores of the next id, in greedy search, beam search and sampling.

    Rules of one's own are given as `f.options(extra_rules=(rule, ...))`. They act in every run, traced or not, after
    the built-in rules and before the forced ids. A complete one, by which no id follows itself:

        class NotTwice:
            name = "not_twice"

            def applies(self, generated):
                return generated >= 1

            def __call__(self, scores, sequences, generated):
                newest = sequences.gather(1, generated[:, None])  # (R, 1)
                return scores.scatter(1, newest, float("-inf"))

        f.run("<CAPTION>", "photo.jpg", extra_rules=(NotTwice(),))

    A rule holds no state of a run: what it needs to know is in `sequences`, which beam search reorders between steps.
    It must leave every sequence at least one possible id; a beam without any comes to its end there. Rows of finished
    inputs may hold anything, and their scores are not used.
    """

    @property
    def name(self) -> str:
        """The rule's name in traces and reports: letters, digits and _, and no other rule's name."""
        ...

    def applies(self, generated: int) -> bool:
        """Return whether the rule is active at the step that follows `generated` ids."""
        ...

    def __call__(self, scores: Tensor, sequences: Tensor, generated: Tensor) -> Tensor:
        """Return the changed scores.

        Args:
            scores: (R, V) of the next id of R sequences, on the model's device: log-probabilities in beam search, raw
                logits otherwise; -inf is impossible. May be changed in place.
            sequences: (R, L) long: the start id at position 0, the generated ids, then padding.
            generated: (R,) long: how many ids each sequence has after its start id, so position `generated` holds the
                newest.

        Returns:
            The scores, (R, V).
        """
        ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Scores of ids that occurred already are divided by `penalty`, negative ones multiplied (CTRL, section 4.1)."""

    penalty: float
    name: ClassVar[str] = "repetition_penalty"
    by_row: ClassVar[bool] = True

    def applies(self, generated: int) -> bool:
        """Apply at every step: the start id counts as an occurrence."""
        return generated >= 0

    def __call__(self, scores: Tensor, sequences: Tensor, generated: Tensor) -> Tensor:
        # positions not written yet stand for the start id, which has occurred anyway
        past = torch.where(_positions(sequences) <= generated[:, None], sequences, sequences[:, :1])
        seen = scores.gather(1, past)
        return scores.scatter_(1, past, torch.where(seen < 0, seen * self.penalty, seen / self.penalty))


@dataclass(frozen=True)
class NoRepeatNgram:
    """An id is impossible when it would complete an n-gram that occurred already. The start id counts as an id."""

    size: int
    name: ClassVar[str] = "no_repeat_ngram"
    by_row: ClassVar[bool] = True

    def applies(self, generated: int) -> bool:
        """Apply from the first complete n-gram on."""
        return 1 + generated >= self.size

    def __call__(self, scores: Tensor, sequences: Tensor, generated: Tensor) -> Tensor:
        n = self.size
        if sequences.shape[1] < n:  # no room for an n-gram yet
            return scores
        windows = sequences.unfold(1, n, 1)  # (R, L - n + 1, n): every n-gram, those of padding too
        written = _positions(sequences)[n - 1 :] <= generated[:, None]  # by the position of the n-gram's last id
        newest = generated[:, None] + torch.arange(2 - n, 1, device=scores.device)  # (R, n - 1) positions
        # (R, n - 1): the beginning of the n-gram that the next id completes; a row too short for one has none written
        present = sequences.gather(1, newest.clamp(min=0))
        repeats = (windows[:, :, :-1] == present[:, None]).all(dim=-1) & written
        # the smaller of its score and -inf (a repeat) or +inf (none): no id is freed again by a second window
        bans = torch.where(repeats, _NEVER, -_NEVER).to(scores.dtype)
        return scores.scatter_reduce_(1, windows[:, :, -1], bans, "amin")


@dataclass(frozen=True)
class MinNewTokens:
    """The end id is impossible until `least` ids have been generated."""

    least: int
    end: int
    name: ClassVar[str] = "min_new_tokens"
    by_row: ClassVar[bool] = True

    def applies(self, generated: int) -> bool:
        """Apply until there are enough ids."""
        return generated < self.least

    def __call__(self, scores: Tensor, sequences: Tensor, generated: Tensor) -> Tensor:  # noqa: ARG002
        scores[:, self.end].masked_fill_(generated < self.least, _NEVER)
        return scores


@dataclass(frozen=True)
class ForcedId:
    """When `generated` ids have been generated, the next is `id`, with log-probability 0."""

    id: int
    generated: int
    name: str = "forced"
    by_row: ClassVar[bool] = True

    def applies(self, generated: int) -> bool:
        """Apply at one step alone."""
        return generated == self.generated

    def __call__(self, scores: Tensor, sequences: Tensor, generated: Tensor) -> Tensor:  # noqa: ARG002
        due = generated == self.generated
        scores.masked_fill_(due[:, None], _NEVER)
        scores[:, self.id].masked_fill_(due, 0.0)
        return scores


def _positions(sequences: Tensor) -> Tensor:
    return torch.arange(sequences.shape[1], device=sequences.device)
