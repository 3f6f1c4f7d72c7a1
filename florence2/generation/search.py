"""The search over any step function, and beam search: it knows tensors and no model.

Beam search is that of transformers' `generate`, from which the published answers come: 2·K candidates a step, finished
hypotheses scored by (sum of log-probabilities) / length^length_penalty, and its three ways to stop. Greedy search and
sampling are in `sampling`. Dimensions: B inputs, K beams, M candidates, T ids, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from florence2.generation.options import GenerationOptions
from florence2.generation.sampling import Greedy, Sampling
from florence2.generation.state import NEVER, Generation, SearchState, SpecialIds, finish_search, may_ask, show_choice
from florence2.generation.topk import topk
from florence2.model.trace import NO_TRACE, Trace

Step = Callable[[Tensor], Tensor]
"""The newest id of every beam (B·K,) -> float32 logits (B·K, V) of the next id."""
Reorder = Callable[[Tensor], None]
"""Let beam k of input b continue beam parents[b, k]: (B, K)."""
Keep = Callable[[Tensor], None]
"""Continue with the inputs rows (B',) of the B alone."""

_COMPACT_BELOW = 0.75  # with a smaller share of a batch still running, the finished inputs are left out
# All K beams are equal at the start, so only the first may be continued. The reference uses this number, not -inf.
_NOT_STARTED = -1e9


def search(
    step: Step,
    reorder: Reorder,
    batch: int,
    options: GenerationOptions,
    ids: SpecialIds,
    device: torch.device | str = "cpu",
    keep: Keep | None = None,
    trace: Trace = NO_TRACE,
) -> Generation:
    """Run the search that `options` ask for, on `batch` inputs together.

    With `keep`, finished inputs are left out as soon as they are a quarter of those computed. A `trace` is shown the
    scores after every rule, and what each step compared and chose (see `show_choice`).

    Raises OptionError when extra rules leave an input nothing to continue with.
    """
    running = _Running(start_search(batch, options, ids, device))
    for n in range(1, options.max_new_tokens + 1):
        running.make_room_for(n)
        logits = step(running.state.newest.flatten()).float()  # a model in float64 searches as one in float32
        running.state = running.state.advance(logits, n, trace)
        left = int((~running.state.done).sum())  # the one question to the device in each step
        if left == 0 or n == options.max_new_tokens:
            break
        reorder(running.state.parents)  # the cache follows the beams that continue
        if keep is not None and left <= _COMPACT_BELOW * len(running.rows):
            keep(running.drop_done())
    return running.restore().finish()


class _Running:
    """The state of the inputs that still run, and where they stand among all inputs."""

    def __init__(self, state: "SearchState"):
        self.all = self.state = state
        self.rows = torch.arange(len(state.done), device=state.done.device)

    def make_room_for(self, n: int) -> None:
        """Give every sequence room for its n-th id."""
        self.all, self.state = self.all.with_room_for(n), self.state.with_room_for(n)

    def drop_done(self) -> Tensor:
        """Leave the finished inputs out; return which of the present ones are kept (B',)."""
        self.all = self.restore()
        kept = (~self.state.done).nonzero()[:, 0]
        self.rows, self.state = self.rows[kept], self.state.pick(kept)
        return kept

    def restore(self) -> "SearchState":
        """Return the state of all inputs."""
        return self.all.put(self.rows, self.state)


def start_search(batch: int, options: GenerationOptions, ids: SpecialIds, device: torch.device | str) -> "SearchState":
    """Return the state of a search on `batch` inputs before its first step."""
    if options.sample:
        return Sampling.start(batch, options, ids, device)
    return (Greedy if options.num_beams == 1 else BeamSearch).start(batch, options, ids, device)


@dataclass(frozen=True)
class BeamSearch(SearchState):
    """The K likeliest running sequences of every input, and the K best finished ones."""

    by_position = ("sequences", "logprobs", "hypotheses", "hypothesis_logprobs")

    # running, with their summed log-probabilities
    sequences: Tensor  # (B, K, 1 + room) long, padded
    logprobs: Tensor  # (B, K, room), of each generated id
    sums: Tensor  # (B, K)
    # finished, best first; empty places score -inf
    hypotheses: Tensor  # (B, K, 1 + room) long, padded
    hypothesis_logprobs: Tensor  # (B, K, room)
    scores: Tensor  # (B, K) float64, as the reference compares them
    lengths: Tensor  # (B, K) long
    ended: Tensor  # (B, K) bool: by the end id
    powers: Tensor  # (B, 1 + limit) float64: length^length_penalty, as Python computes it and not as an accelerator

    @classmethod
    def start(cls, B: int, options: GenerationOptions, ids: SpecialIds, device: torch.device | str) -> "BeamSearch":
        """Return the state before the first step."""
        K, limit = options.num_beams, options.max_new_tokens
        zeros = torch.zeros(B, K, dtype=torch.long, device=device)
        sequences = torch.full((B, K, 1 + limit), ids.pad, device=device)
        sequences[:, :, 0] = ids.start
        # kept for each id, because answers are scored by token
        logprobs = torch.zeros(B, K, limit, dtype=torch.float32, device=device)
        sums = torch.full((B, K), _NOT_STARTED, dtype=torch.float32, device=device)
        sums[:, 0] = 0.0
        powers = [1.0, *(float(length) ** options.length_penalty for length in range(1, 1 + limit))]
        return cls(
            options=options,
            ids=ids,
            generated=zeros[:, 0],
            newest=sequences[:, :, 0],
            parents=zeros,
            done=zeros[:, 0] > 0,
            sequences=sequences,
            logprobs=logprobs,
            sums=sums,
            hypotheses=sequences,  # nothing writes into either in place: `_append` gets a copy from `_pick`
            hypothesis_logprobs=logprobs,
            scores=torch.full_like(sums, NEVER, dtype=torch.float64),
            lengths=zeros,
            ended=zeros > 0,
            powers=torch.tensor(powers, dtype=torch.float64, device=device).expand(B, -1),
        )

    def advance(self, logits: Tensor, n: int | Sequence[int], trace: Trace = NO_TRACE) -> "BeamSearch":
        """Compare 2·K candidates: of those that end the first K may finish, and K of the rest continue."""
        B, K = self.newest.shape
        logits = logits.float()  # a model in float64 gives such logits
        # with beams the rules see log-probabilities, in greedy search raw logits, as in the reference
        scores = self._apply_rules(logits.log_softmax(dim=-1), self.sequences.flatten(0, 1), n, trace)
        scores = trace("scores", scores).view(B, K, -1)
        # as many as may be needed: at most K of them end, one a beam, so at least K continue
        sums, flat = topk((scores + self.sums[:, :, None]).flatten(1), 2 * K)  # (B, 2·K), best first
        parents, tokens = flat // scores.shape[2], flat % scores.shape[2]  # (B, 2·K): beam and id of each candidate
        return self.settle(sums, parents, tokens, scores.flatten(1).gather(1, flat), trace)

    def settle(
        self, sums: Tensor, parents: Tensor, tokens: Tensor, chosen: Tensor, trace: Trace = NO_TRACE
    ) -> "BeamSearch":
        """Let candidates finish or continue: their sums, beams, ids and log-probabilities (B, 2·K), best first."""
        K, generated = self.newest.shape[1], self.generated + 1
        candidates = replace(
            self,
            generated=generated,
            newest=tokens,
            parents=parents,
            sequences=_append(_pick(self.sequences, parents), generated, tokens),
            logprobs=_append(_pick(self.logprobs, parents), self.generated, chosen),
            sums=sums,
        )
        ends = tokens == self.ids.end
        # as in the reference, an end that ranks below the first K candidates is dropped
        ends_well = ends & (torch.arange(2 * K, device=ends.device) < K) & ~self.done[:, None]
        # most steps end nothing; on a CPU, where asking is free, they leave the finished ones as they are
        nothing_ends = may_ask(ends_well) and not ends_well.any()
        finished = candidates if nothing_ends else candidates._with_finished(ends_well, ended=True)
        survivors = ends.long().argsort(dim=1, stable=True)[:, :K]  # the first K that do not end
        running = finished._with_running(survivors)
        done = self.done | running._is_done(sums[:, 0])
        show_choice(trace, tokens, parents, sums, ends_well, survivors, done)
        return replace(running, done=done)

    def finish(self) -> Generation:
        """Return the result; running sequences that the limit cut compete with the finished ones."""
        cut = self._with_finished(~self.done[:, None].expand_as(self.sums), ended=False)

        def rows(values: Tensor) -> Tensor:
            return values[:, : self.options.num_return_sequences].flatten(0, 1)

        sequences, logprobs = rows(cut.hypotheses), rows(cut.hypothesis_logprobs)
        return finish_search(sequences, logprobs, rows(cut.scores), rows(cut.lengths), rows(cut.ended), self.options)

    def _with_running(self, which: Tensor) -> "BeamSearch":
        """Continue with the candidates `which` (B, K) alone."""
        return replace(
            self,
            newest=self.newest.gather(1, which),
            parents=self.parents.gather(1, which),
            sequences=_pick(self.sequences, which),
            logprobs=_pick(self.logprobs, which),
            sums=self.sums.gather(1, which),
        )

    def _with_finished(self, which: Tensor, ended: bool) -> "BeamSearch":
        """Let the running sequences that `which` (B, M) marks take the place of worse hypotheses."""
        # in double precision and by a table of powers, so that every device ranks as the reference's Python does
        new = (self.sums.double() / self.powers.gather(1, self.generated[:, None])).where(which, NEVER)
        scores = torch.cat([self.scores, new], dim=1)
        # stable, so that of equal ones the earlier stays
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.scores.shape[1]]
        lengths = torch.cat([self.lengths, self.generated[:, None].expand_as(which)], dim=1)
        return replace(
            self,
            scores=scores.gather(1, order),
            hypotheses=_pick(torch.cat([self.hypotheses, self.sequences], dim=1), order),
            hypothesis_logprobs=_pick(torch.cat([self.hypothesis_logprobs, self.logprobs], dim=1), order),
            lengths=lengths.gather(1, order),
            ended=torch.cat([self.ended, torch.full_like(which, ended)], dim=1).gather(1, order),
        )

    def _is_done(self, best_running: Tensor) -> Tensor:
        """Return the inputs (B,) that need no further step, given the sum (B,) of their best candidate."""
        worst = self.scores[:, -1]
        full = worst > NEVER  # K hypotheses are finished
        options = self.options
        if options.early_stopping is True:
            return full
        length = self.generated
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = torch.full_like(length, options.max_new_tokens)  # where a longer hypothesis would score best
        return full & (worst >= best_running.double() / self.powers.gather(1, length[:, None])[:, 0])


def _pick(values: Tensor, which: Tensor) -> Tensor:
    """(B, M, T), (B, M') -> (B, M', T)"""
    return values.gather(1, which[:, :, None].expand(-1, -1, values.shape[2]))


def _append(values: Tensor, position: Tensor, new: Tensor) -> Tensor:
    """Write `new` (B, M) into `values` (B, M, T) at `position` (B,) of the last dimension, in place."""
    return values.scatter_(2, position[:, None, None].expand(*new.shape, 1), new[:, :, None])
