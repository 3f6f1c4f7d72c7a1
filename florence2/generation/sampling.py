"""Greedy search and sampling: the sequences of an input are written side by side and never compete.

Dimensions: B inputs, K sequences of each, V vocabulary, M ids that may be drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from florence2.generation.options import GenerationOptions
from florence2.generation.state import NEVER, Generation, SearchState, SpecialIds, finish_search, show_choice
from florence2.generation.topk import topk
from florence2.model.trace import NO_TRACE, Trace

Independent = TypeVar("Independent", bound="Greedy")
_MOST_DRAW = 1 - 1e-6  # below 1 by more than rounding, so that a draw lies below the sum of all probabilities


@dataclass(frozen=True)
class Greedy(SearchState):
    """The likeliest id at every step. The rules see raw logits, and log-probabilities are taken after them."""

    by_position = ("sequences", "logprobs")

    sequences: Tensor  # (B, K, 1 + room) long, padded
    logprobs: Tensor  # (B, K, room), of each generated id
    lengths: Tensor  # (B, K) long: ids before and with the end
    ended: Tensor  # (B, K) bool

    @classmethod
    def start(
        cls: type[Independent],
        B: int,
        options: GenerationOptions,
        ids: SpecialIds,
        device: torch.device | str,
        **more: Tensor,
    ) -> Independent:
        """Return the state before the first step; `more` are the fields of a subclass."""
        K, limit = options.width, options.max_new_tokens
        zeros = torch.zeros(B, K, dtype=torch.long, device=device)
        sequences = torch.full((B, K, 1 + limit), ids.pad, device=device)
        sequences[:, :, 0] = ids.start
        return cls(
            options=options,
            ids=ids,
            generated=zeros[:, 0],
            newest=sequences[:, :, 0].clone(),
            parents=zeros + torch.arange(K, device=device),  # every sequence continues itself
            done=zeros[:, 0] > 0,
            sequences=sequences,
            logprobs=torch.zeros(B, K, limit, dtype=torch.float32, device=device),
            lengths=zeros,
            ended=zeros > 0,
            **more,
        )

    def advance(self: Independent, logits: Tensor, n: int | Sequence[int], trace: Trace = NO_TRACE) -> Independent:
        """Append an id to every sequence that still runs."""
        logits = logits.to(torch.float32, copy=True)  # a model in float64 gives such logits; rules may write into them
        scores = self._apply_rules(logits, self.sequences.flatten(0, 1), n, trace)
        chosen, tokens = self.choose(trace("scores", scores.log_softmax(dim=-1)))  # (B·K,) each
        chosen, tokens = chosen.view_as(self.newest), tokens.view_as(self.newest)  # (B, K)
        generated, ended = self.generated + 1, self.ended | (tokens == self.ids.end)
        advanced = replace(
            self,
            generated=generated,
            newest=tokens,
            done=ended.all(dim=1),
            sequences=_write(self.sequences, generated, tokens.where(~self.ended, self.ids.pad)),
            logprobs=_write(self.logprobs, self.generated, chosen.where(~self.ended, 0.0)),
            lengths=self.lengths + ~self.ended,
            ended=ended,
        )
        if trace is not NO_TRACE:  # spares every step the sums
            sums = (self.logprobs.sum(dim=-1) + chosen).where(~self.ended, NEVER)
            show_choice(trace, tokens, self.parents, sums, ended & ~self.ended, self.parents, advanced.done)
        return advanced

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the next id of every sequence by log-probabilities (B·K, V); return its own and the id, (B·K,)."""
        best, tokens = scores.max(dim=-1)
        return best, tokens

    def _is_stuck(self, possible: Tensor) -> Tensor:
        """Return the inputs (B,) one of whose sequences cannot continue: none can take its place."""
        return ~(possible | self.ended).all(dim=1)

    def finish(self) -> Generation:
        """Return the result."""
        scores = self.logprobs.sum(dim=-1) / self.lengths.double() ** self.options.length_penalty
        sequences, logprobs = self.sequences.flatten(0, 1), self.logprobs.flatten(0, 1)  # (B·K, ...)
        lengths, ended = self.lengths.flatten(), self.ended.flatten()
        return finish_search(sequences, logprobs, scores.flatten(), lengths, ended, self.options)


@dataclass(frozen=True)
class Sampling(Greedy):
    """An id drawn by its probability at every step: rules, then temperature, top-k, top-p, then the draw.

    A draw is one number in [0, 1), by which the sum of the probabilities is cut. All draws are made at the start, the
    same for every input of a seed, so neither the batch nor leaving out finished inputs can change an answer.
    """

    draws: Tensor  # (B, K, limit)

    @classmethod
    def start(
        cls: type[Independent],
        B: int,
        options: GenerationOptions,
        ids: SpecialIds,
        device: torch.device | str,
        **more: Tensor,
    ) -> Independent:
        """Return the state before the first step, with all draws."""
        K, limit = options.width, options.max_new_tokens
        if options.seed is None:
            draws = torch.rand(B, K, limit, dtype=torch.float32, device="cpu")
        else:  # on the CPU, so that a seed means the same on every device
            generator = torch.Generator().manual_seed(options.seed)
            draws = torch.rand(K, limit, dtype=torch.float32, generator=generator, device="cpu")
            draws = draws.repeat(B, 1, 1)  # (B, K, limit)
        return super().start(B, options, ids, device, draws=draws.clamp_(max=_MOST_DRAW).to(device), **more)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the next id of every sequence; see `Greedy.choose`.

        The log-probability that is returned is that before temperature, top-k and top-p: the model's own, so that
        answers drawn with different settings, and those of a search, can be compared.
        """
        options = self.options
        ids, probabilities = drawable(scores, options.temperature, options.top_k, options.top_p)  # (B·K, M)
        sums = probabilities.cumsum(dim=-1)
        position = self.generated[:, None, None].expand(-1, self.draws.shape[1], 1)  # (B, K, 1)
        draws = self.draws.gather(2, position).view(-1, 1) * sums[:, -1:]  # (B·K, 1)
        place = torch.searchsorted(sums, draws, right=True)  # of the first sum above the draw
        # an accelerator may add in another order for each sum, and so reach an id whose probability is 0
        place = place.where(probabilities.gather(1, place) > 0, probabilities.argmax(dim=-1, keepdim=True))
        tokens = ids.gather(1, place)
        return scores.gather(1, tokens)[:, 0], tokens[:, 0]


def drawable(scores: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the ids that may be drawn and their probabilities, (R, M) each, by log-probabilities (R, V)."""
    if 0 < top_k < scores.shape[1]:
        values, ids = topk(scores, top_k)
    elif top_p < 1:
        values, ids = scores.sort(dim=-1, descending=True)
    else:  # no order is needed, and sorting takes as long as half a step
        values, ids = scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    best = values.amax(dim=-1, keepdim=True)
    probabilities = ((values - best) / temperature).softmax(dim=-1)
    if top_p < 1:
        likelier = probabilities.cumsum(dim=-1) - probabilities  # the sum of all likelier ids
        probabilities = probabilities.where(likelier < top_p, 0.0)
    return ids, probabilities


def _write(values: Tensor, position: Tensor, new: Tensor) -> Tensor:
    """Return `values` (B, K, T) with `new` (B, K) at `position` (B,) of the last dimension."""
    return values.scatter(2, position[:, None, None].expand(*new.shape, 1), new[:, :, None])
