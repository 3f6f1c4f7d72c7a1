"""Greedy and beam search over any step function: knows tensors, no model.

The search is that of transformers' `generate`, from which the published answers come: 2·K candidates a step,
finished hypotheses scored by (sum of log-probabilities) / length^length_penalty, and its three ways to stop.
Dimensions: B inputs, K beams, t tokens so far, V vocabulary.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from florence2.generation.options import GenerationOptions as GenerationOptions  # whoever searches needs it too
from florence2.generation.rules import ForcedId, MinNewTokens, NoRepeatNgram, RepetitionPenalty, Rule
from florence2.generation.topk import topk
from florence2.model.trace import Trace, record

Step = Callable[[Tensor], Tensor]
"""The newest id of every beam (B·K,) -> float32 logits (B·K, V) of the next."""
Reorder = Callable[[Tensor], None]
"""Beam k of input b goes on from beam parents[b, k]: (B, K)."""
Keep = Callable[[Tensor], None]
"""Only the inputs rows (B',) of the B go on."""
State = TypeVar("State", bound="SearchState")

_NEVER = float("-inf")
_CROWDED = 0.75  # of a batch: with fewer still running, the others are left out
_UNBORN = -1e9  # at the start all K beams are equal, and only the first may be continued: as in the reference


@dataclass(frozen=True)
class SpecialIds:
    """The ids that the search itself must know."""

    start: int = 2
    """Where every sequence begins; not generated."""
    end: int = 2
    pad: int = 1


@dataclass(frozen=True)
class Generation:
    """What a search found: `num_return_sequences` rows R per input, best first.

    `sequences` (B·R, 1 + T) long: the start id, the generated ids, then padding. `lengths` (B·R,) long: how many
    ids were generated. `token_logprobs` (B·R, T): the log-probability of each of them after the rules, 0 for forced
    ids and padding. `sequence_scores` (B·R,): their sum / length^length_penalty. `finish_reasons`: "stop" when the
    model ended the sequence, "length" when the limit did.
    """

    sequences: Tensor
    token_logprobs: Tensor
    sequence_scores: Tensor
    lengths: Tensor
    finish_reasons: tuple[str, ...]


def search(
    step: Step,
    reorder: Reorder,
    batch: int,
    options: GenerationOptions,
    ids: SpecialIds,
    device: torch.device | str = "cpu",
    keep: Keep | None = None,
    trace: Trace | None = None,
) -> Generation:
    """Run the search that `options` ask for, on `batch` inputs at once.

    With `keep`, inputs that are done are left out as soon as they are a quarter of those computed. A `trace` is shown
    the scores after every rule, and what each step compared and chose (see `_show_choice`).
    """
    whole = state = start_search(batch, options, ids, device)
    rows = torch.arange(batch, device=device)  # which inputs `state` is about
    for n in range(1, options.max_new_tokens + 1):
        state = state.advance(step(state.newest.flatten()), n, trace)
        running = ~state.done
        left = int(running.sum())
        if left == 0 or n == options.max_new_tokens:
            break
        reorder(state.parents)
        if keep is not None and left <= _CROWDED * len(rows):
            whole, kept = whole.put(rows, state), running.nonzero()[:, 0]
            keep(kept)
            rows, state = rows[kept], state.pick(kept)
    return whole.put(rows, state).finish()


def start_search(batch: int, options: GenerationOptions, ids: SpecialIds, device: torch.device | str) -> "SearchState":
    """The state of a search on `batch` inputs before its first step."""
    return (_Greedy if options.num_beams == 1 else _BeamSearch).start(batch, options, ids, device)


def logit_rules(options: GenerationOptions, ids: SpecialIds) -> list[Rule]:
    """The rules that `options` switch on, in the reference's order, which matters: the last word is the forced end."""
    rules: list[Rule] = []
    if options.repetition_penalty != 1.0:
        rules.append(RepetitionPenalty(options.repetition_penalty))
    if options.no_repeat_ngram_size > 0:
        rules.append(NoRepeatNgram(options.no_repeat_ngram_size))
    if options.min_new_tokens > 0:
        rules.append(MinNewTokens(options.min_new_tokens, ids.end))
    if options.forced_bos_token_id is not None:
        rules.append(ForcedId(options.forced_bos_token_id, 0, "forced_bos_token"))
    if options.forced_eos_token_id is not None:
        rules.append(ForcedId(options.forced_eos_token_id, options.max_new_tokens - 1, "forced_eos_token"))
    return rules


@dataclass(frozen=True)
class SearchState(abc.ABC):
    """All that a search knows between two steps; `advance` makes the next.

    The tensors are of B inputs each. No value of them decides what `advance` does, only which rules apply to the n-th
    id, and no shape changes: so an accelerator can record a step once and replay it without asking the host.
    """

    options: GenerationOptions
    ids: SpecialIds
    generated: Tensor  # (B,) long: how many ids the running sequences have
    newest: Tensor  # (B, K) long: the last of each
    parents: Tensor  # (B, K) long: which sequences of the step before they continue
    done: Tensor  # (B,) bool: whose result will not change

    @abc.abstractmethod
    def advance(self, logits: Tensor, n: int, trace: Trace | None = None) -> "SearchState":
        """The n-th id of every sequence, n from 1, by its `logits` (B·K, V)."""

    @abc.abstractmethod
    def finish(self) -> Generation:
        """The result; what is still running was cut by the limit."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name of its field, inputs first."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def pick(self: State, rows: Tensor) -> State:
        """The same for the inputs `rows` (B',) alone."""
        picked: dict[str, Any] = {name: value[rows] for name, value in self.tensors().items()}
        return replace(self, **picked)

    def put(self: State, rows: Tensor, part: State) -> State:
        """This, with what `part` knows of the inputs `rows` (B',)."""
        news = part.tensors().items()
        merged: dict[str, Any] = {name: getattr(self, name).index_copy(0, rows, new) for name, new in news}
        return replace(self, **merged)

    def _apply_rules(self, scores: Tensor, sequences: Tensor, n: int, trace: Trace | None) -> Tensor:
        """`scores` (R, V) of the n-th id of `sequences` (R, 1 + limit), with R a multiple of B."""
        generated = self.generated.repeat_interleave(len(sequences) // len(self.generated))
        for rule in logit_rules(self.options, self.ids):
            before = scores.clone() if trace is not None and trace.wants(f"search.banned.{rule.name}") else None
            if rule.applies(n - 1):
                scores = rule(scores, sequences, generated)
            if trace is not None:
                scores = _show_rule(trace, rule, before, scores)
        return scores


@dataclass(frozen=True)
class _Greedy(SearchState):
    """The likeliest id at every step. The rules see raw logits, and log-probabilities are taken after them."""

    sequences: Tensor  # (B, 1 + limit) long, padded
    logprobs: Tensor  # (B, limit), of each generated id
    lengths: Tensor  # (B,) long: ids before and with the end

    @classmethod
    def start(cls, B: int, options: GenerationOptions, ids: SpecialIds, device: torch.device | str) -> "_Greedy":
        none = torch.zeros(B, dtype=torch.long, device=device)
        sequences = torch.full((B, 1 + options.max_new_tokens), ids.pad, device=device)
        sequences[:, 0] = ids.start
        logprobs = torch.zeros(B, options.max_new_tokens, device=device)
        newest = sequences[:, :1].clone()
        return cls(options, ids, none, newest, none[:, None], none > 0, sequences, logprobs, none)

    def advance(self, logits: Tensor, n: int, trace: Trace | None = None) -> "_Greedy":
        scores = self._apply_rules(logits.clone(), self.sequences, n, trace)
        best, tokens = record(trace, "scores", scores.log_softmax(dim=-1)).max(dim=-1)
        generated = self.generated + 1
        advanced = replace(
            self,
            generated=generated,
            newest=tokens[:, None],
            done=self.done | (tokens == self.ids.end),
            sequences=self.sequences.scatter(1, generated[:, None], tokens.where(~self.done, self.ids.pad)[:, None]),
            logprobs=self.logprobs.scatter(1, self.generated[:, None], best.where(~self.done, 0.0)[:, None]),
            lengths=self.lengths + ~self.done,
        )
        if trace is not None:
            ends, sums = (tokens == self.ids.end) & ~self.done, self.logprobs.sum(dim=1) + best
            none = self.parents
            _show_choice(trace, tokens[:, None], none, sums[:, None], ends[:, None], none, advanced.done)
        return advanced

    def finish(self) -> Generation:
        scores = self.logprobs.sum(dim=1) / self.lengths.double() ** self.options.length_penalty
        return _finish(self.sequences, self.logprobs, scores, self.lengths, self.done, self.options)


@dataclass(frozen=True)
class _BeamSearch(SearchState):
    """The K likeliest running sequences of every input, and the K best finished ones."""

    # running, with their summed log-probabilities
    sequences: Tensor  # (B, K, 1 + limit) long, padded
    logprobs: Tensor  # (B, K, limit), of each generated id
    sums: Tensor  # (B, K)
    # finished, best first; empty places score -inf
    hypotheses: Tensor  # (B, K, 1 + limit) long, padded
    hypothesis_logprobs: Tensor  # (B, K, limit)
    scores: Tensor  # (B, K) float64, as the reference compares them
    lengths: Tensor  # (B, K) long
    ended: Tensor  # (B, K) bool: by the end id
    powers: Tensor  # (B, 1 + limit) float64: length^length_penalty, as Python computes it and not as an accelerator

    @classmethod
    def start(cls, B: int, options: GenerationOptions, ids: SpecialIds, device: torch.device | str) -> "_BeamSearch":
        K, limit = options.num_beams, options.max_new_tokens
        none = torch.zeros(B, K, dtype=torch.long, device=device)
        sequences = torch.full((B, K, 1 + limit), ids.pad, device=device)
        sequences[:, :, 0] = ids.start
        logprobs = torch.zeros(B, K, limit, device=device)
        sums = torch.full((B, K), _UNBORN, device=device)
        sums[:, 0] = 0.0
        powers = [1.0, *(float(length) ** options.length_penalty for length in range(1, 1 + limit))]
        return cls(
            options=options,
            ids=ids,
            generated=none[:, 0],
            newest=sequences[:, :, 0],
            parents=none,
            done=none[:, 0] > 0,
            sequences=sequences,
            logprobs=logprobs,
            sums=sums,
            hypotheses=sequences,
            hypothesis_logprobs=logprobs,
            scores=torch.full_like(sums, _NEVER, dtype=torch.float64),
            lengths=none,
            ended=none > 0,
            powers=torch.tensor(powers, dtype=torch.float64, device=device).expand(B, -1),
        )

    def advance(self, logits: Tensor, n: int, trace: Trace | None = None) -> "_BeamSearch":
        """2·K candidates are compared; of those that end the first K may finish, of the others K go on."""
        B, K = self.newest.shape
        scores = self._apply_rules(logits.log_softmax(dim=-1), self.sequences.flatten(0, 1), n, trace)
        scores = record(trace, "scores", scores).view(B, K, -1)
        sums, flat = topk((scores + self.sums[:, :, None]).flatten(1), 2 * K)  # (B, 2·K), best first
        parents, tokens = flat // scores.shape[2], flat % scores.shape[2]
        generated = self.generated + 1
        candidates = replace(
            self,
            generated=generated,
            newest=tokens,
            parents=parents,
            sequences=_append(_pick(self.sequences, parents), generated, tokens),
            logprobs=_append(_pick(self.logprobs, parents), self.generated, scores.flatten(1).gather(1, flat)),
            sums=sums,
        )
        ends = tokens == self.ids.end
        ends_well = ends & (torch.arange(2 * K, device=ends.device) < K) & ~self.done[:, None]
        finished = candidates._with_finished(ends_well, ended=True)
        # at most K candidates end, one per beam, so K are left: the first K that go on
        survivors = ends.long().argsort(dim=1, stable=True)[:, :K]
        going_on = finished._with_running(survivors)
        done = self.done | going_on._is_done(sums[:, 0])
        if trace is not None:
            _show_choice(trace, tokens, parents, sums, ends_well, survivors, done)
        return replace(going_on, done=done)

    def finish(self) -> Generation:
        cut = self._with_finished(~self.done[:, None].expand_as(self.sums), ended=False)

        def rows(values: Tensor) -> Tensor:
            return values[:, : self.options.num_return_sequences].flatten(0, 1)

        sequences, logprobs = rows(cut.hypotheses), rows(cut.hypothesis_logprobs)
        return _finish(sequences, logprobs, rows(cut.scores), rows(cut.lengths), rows(cut.ended), self.options)

    def _with_running(self, which: Tensor) -> "_BeamSearch":
        """Only the candidates `which` (B, K) go on."""
        return replace(
            self,
            newest=self.newest.gather(1, which),
            parents=self.parents.gather(1, which),
            sequences=_pick(self.sequences, which),
            logprobs=_pick(self.logprobs, which),
            sums=self.sums.gather(1, which),
        )

    def _with_finished(self, which: Tensor, ended: bool) -> "_BeamSearch":
        """The running sequences that `which` (B, M) marks take the place of worse hypotheses."""
        new = (self.sums.double() / self.powers.gather(1, self.generated[:, None])).where(which, _NEVER)
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
        """Which inputs (B,) need no further step, given the sum (B,) of their best candidate."""
        worst = self.scores[:, -1]
        full = worst > _NEVER
        options = self.options
        if options.early_stopping is True:
            return full
        length = self.generated
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = torch.full_like(length, options.max_new_tokens)  # where a longer hypothesis would score best
        return full & (worst >= best_running.double() / self.powers.gather(1, length[:, None])[:, 0])


def _show_rule(trace: Trace, rule: Rule, before: Tensor | None, after: Tensor) -> Tensor:
    """What a rule made impossible, as (row, id) pairs (bans, 2), and the scores (B·K, V) after it, at every step.

    The pairs of a forced id would be the whole vocabulary, so they are left out. The run goes on with a copy of what
    is shown, for the next rule may change its scores in place.
    """
    if before is not None and not isinstance(rule, ForcedId):
        trace(f"search.banned.{rule.name}", ((after == _NEVER) & (before != _NEVER)).nonzero())
    name = f"scores.{rule.name}"
    return trace(name, after).clone() if trace.wants(name) else after


def _show_choice(
    trace: Trace, tokens: Tensor, parents: Tensor, sums: Tensor, finished: Tensor, survivors: Tensor, done: Tensor
) -> None:
    """One step of the search: its M candidates (B, M), best first, and what became of them.

    `parents` are the beams that they continue, `sums` their summed log-probabilities, `finished` those that became
    hypotheses; `survivors` (B, K) are the candidates that go on, as the beams 0 to K - 1; `done` (B,).
    """
    trace("search.candidates.tokens", tokens)
    trace("search.candidates.parents", parents)
    trace("search.candidates.sums", sums)
    trace("search.finished", finished)
    trace("search.survivors", survivors)
    trace("search.done", done)


def _pick(values: Tensor, which: Tensor) -> Tensor:
    """(B, M, T), (B, M') -> (B, M', T)"""
    return values.gather(1, which[:, :, None].expand(-1, -1, values.shape[2]))


def _append(values: Tensor, position: Tensor, new: Tensor) -> Tensor:
    """`values` (B, M, T), at `position` (B,) of its last dimension `new` (B, M); in place."""
    return values.scatter_(2, position[:, None, None].expand(*new.shape, 1), new[:, :, None])


def _finish(
    sequences: Tensor, logprobs: Tensor, scores: Tensor, lengths: Tensor, ended: Tensor, options: GenerationOptions
) -> Generation:
    longest = int(lengths.max())
    # the end that the limit forced is not the model's own
    was_cut = ~ended | ((lengths == options.max_new_tokens) & (options.forced_eos_token_id is not None))
    reasons = tuple("length" if cut else "stop" for cut in was_cut.tolist())
    return Generation(sequences[:, : 1 + longest], logprobs[:, :longest], scores.float(), lengths, reasons)
