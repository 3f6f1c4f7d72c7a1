"""Greedy and beam search over any step function: knows tensors, no model.

The search is that of transformers' `generate`, from which the published answers come: 2·K candidates a step,
finished hypotheses scored by (sum of log-probabilities) / length^length_penalty, and its three ways to stop.
Dimensions: B inputs, K beams, t tokens so far, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from florence2.errors import OptionError

Step = Callable[[Tensor], Tensor]
"""The newest id of every beam (B·K,) -> float32 logits (B·K, V) of the next."""
Reorder = Callable[[Tensor], None]
"""Beam k of input b goes on from beam parents[b, k]: (B, K)."""
Rule = Callable[[Tensor, Tensor], Tensor]
"""Scores (R, V) of the next id and the ids so far (R, t) -> changed scores, perhaps in the same memory."""

_NEVER = float("-inf")
_UNBORN = -1e9  # at the start all K beams are equal, and only the first may be continued: as in the reference


@dataclass(frozen=True)
class GenerationOptions:
    """The settings of one generation. The defaults are those of the published checkpoints.

    A checkpoint's own are `from_checkpoint(config.generation)`, or `Florence2.options()`.
    """

    num_beams: int = 3
    """1 is greedy search."""
    max_new_tokens: int = 1024
    """Upper limit of the generated ids, the closing one included; a model's positions may set a lower one."""
    min_new_tokens: int = 0
    """The end id is impossible before this many."""
    length_penalty: float = 1.0
    """Exponent of the length by which a hypothesis' summed log-probability is divided; above 0 favours long ones."""
    early_stopping: bool | Literal["never"] = True
    """When K hypotheses are finished: True stops; False stops when the best running beam could not beat the worst of
    them at its present length; "never" only when it could not at any length."""
    no_repeat_ngram_size: int = 3
    """No n-gram of this many ids occurs twice; 0 switches the rule off."""
    repetition_penalty: float = 1.0
    """Above 1 makes ids that already occurred less likely."""
    num_return_sequences: int = 1
    """How many of the K hypotheses are returned for each input, best first."""
    forced_bos_token_id: int | None = 0
    """The id that must be generated first."""
    forced_eos_token_id: int | None = 2
    """The id that must be generated last when `max_new_tokens` is reached."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; it must be a whole number of at least {least}"
            for name, least in _LEAST.items()
            if type(getattr(self, name)) is not int or getattr(self, name) < least
        ]
        if type(self.early_stopping) is not bool and self.early_stopping != "never":
            problems.append(f'early_stopping is {self.early_stopping!r}; it must be True, False or "never"')
        if type(self.length_penalty) not in (int, float) or not abs(self.length_penalty) <= _MOST_PENALTY:
            problems.append(
                f"length_penalty is {self.length_penalty!r}; it must be -{_MOST_PENALTY} to {_MOST_PENALTY}"
            )
        if type(self.repetition_penalty) not in (int, float) or not 0 < self.repetition_penalty <= _MOST_PENALTY:
            problems.append(
                f"repetition_penalty is {self.repetition_penalty!r}; it must be above 0 and at most {_MOST_PENALTY}"
            )
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                problems.append(f"{name} is {value!r}; it must be an id or None")
        if not problems and self.num_return_sequences > self.num_beams:
            problems.append(f"num_return_sequences {self.num_return_sequences} is more than num_beams {self.num_beams}")
        if problems:
            raise OptionError("; ".join(problems) + ".")

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any]) -> "GenerationOptions":
        """The settings that a checkpoint's files state; what they leave out is off, as in transformers.

        Only `max_new_tokens` is then this class' default. Raises OptionError as `changed`.
        """
        off: dict[str, Any] = {
            "num_beams": 1,
            "early_stopping": False,
            "no_repeat_ngram_size": 0,
            "forced_bos_token_id": None,
            "forced_eos_token_id": None,
        }
        return cls().changed(**{**off, **settings})

    def changed(self, **changes: Any) -> "GenerationOptions":
        """A copy with some settings changed. Raises OptionError for names and values that do not exist."""
        known = [field.name for field in fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise OptionError(f"Unknown generation settings: {', '.join(unknown)}. Known ones: {', '.join(known)}.")
        return replace(self, **changes)


_MOST_PENALTY = 100  # keeps powers of lengths, and scores, finite
_LEAST = {
    "num_beams": 1,
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
}


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
) -> Generation:
    """Run the search that `options` ask for, on `batch` inputs at once."""
    if options.num_beams == 1:
        return _greedy(step, batch, options, ids, device)
    return _beam_search(step, reorder, batch, options, ids, device)


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
        rules.append(ForcedId(options.forced_bos_token_id, generated=0))
    if options.forced_eos_token_id is not None:
        rules.append(ForcedId(options.forced_eos_token_id, generated=options.max_new_tokens - 1))
    return rules


@dataclass(frozen=True)
class RepetitionPenalty:
    """Scores of ids that occurred already are divided by `penalty`, negative ones multiplied (CTRL, section 4.1)."""

    penalty: float

    def __call__(self, scores: Tensor, sequences: Tensor) -> Tensor:
        seen = scores.gather(1, sequences)
        return scores.scatter_(1, sequences, torch.where(seen < 0, seen * self.penalty, seen / self.penalty))


@dataclass(frozen=True)
class NoRepeatNgram:
    """An id is impossible when it would complete an n-gram that occurred already. The start id counts as an id."""

    size: int

    def __call__(self, scores: Tensor, sequences: Tensor) -> Tensor:
        n, t = self.size, sequences.shape[1]
        if t < n:
            return scores
        windows = sequences.unfold(1, n, 1)  # (R, t - n + 1, n): every n-gram so far
        present = sequences[:, t - n + 1 :]  # (R, n - 1): what the next id would complete
        repeats = (windows[:, :, :-1] == present[:, None]).all(dim=-1)
        # the smaller of its score and -inf (a repeat) or +inf (none): no id is freed again by a second window
        bans = torch.where(repeats, _NEVER, -_NEVER).to(scores.dtype)
        return scores.scatter_reduce_(1, windows[:, :, -1], bans, "amin")


@dataclass(frozen=True)
class MinNewTokens:
    """The end id is impossible until `least` ids have been generated."""

    least: int
    end: int

    def __call__(self, scores: Tensor, sequences: Tensor) -> Tensor:
        if sequences.shape[1] - 1 < self.least:
            scores[:, self.end] = _NEVER
        return scores


@dataclass(frozen=True)
class ForcedId:
    """When `generated` ids have been generated, the next is `id`, with log-probability 0."""

    id: int
    generated: int

    def __call__(self, scores: Tensor, sequences: Tensor) -> Tensor:
        if sequences.shape[1] - 1 == self.generated:
            scores.fill_(_NEVER)
            scores[:, self.id] = 0.0
        return scores


def _apply(rules: list[Rule], scores: Tensor, sequences: Tensor) -> Tensor:
    for rule in rules:
        scores = rule(scores, sequences)
    return scores


def _greedy(
    step: Step, batch: int, options: GenerationOptions, ids: SpecialIds, device: torch.device | str
) -> Generation:
    """The likeliest id at every step. The rules see raw logits, and log-probabilities are taken after them."""
    limit, rules = options.max_new_tokens, logit_rules(options, ids)
    sequences = torch.full((batch, 1 + limit), ids.pad, device=device)
    sequences[:, 0] = ids.start
    logprobs = torch.zeros(batch, limit, device=device)
    lengths = torch.zeros(batch, dtype=torch.long, device=device)
    running = torch.ones(batch, dtype=torch.bool, device=device)
    for n in range(1, limit + 1):
        logits = step(sequences[:, n - 1]).clone()
        best, tokens = _apply(rules, logits, sequences[:, :n]).log_softmax(dim=-1).max(dim=-1)
        sequences[:, n] = tokens.where(running, ids.pad)
        logprobs[:, n - 1] = best.where(running, 0.0)
        lengths += running
        running = running & (tokens != ids.end)
        if not running.any():
            break
    scores = logprobs.sum(dim=1) / lengths.double() ** options.length_penalty
    return _finish(sequences, logprobs, scores, lengths, ~running, options)


def _beam_search(
    step: Step, reorder: Reorder, batch: int, options: GenerationOptions, ids: SpecialIds, device: torch.device | str
) -> Generation:
    """The K likeliest running sequences at every step, and the K best finished ones."""
    K, limit, rules = options.num_beams, options.max_new_tokens, logit_rules(options, ids)
    beams = _Beams.start(batch, K, limit, ids, device)
    finished = _Finished(beams)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    for n in range(1, limit + 1):
        logits = step(beams.sequences[:, :, n - 1].flatten())  # (B·K, V)
        logprobs = _apply(rules, logits.log_softmax(dim=-1), beams.sequences[:, :, :n].flatten(0, 1))
        candidates, parents = beams.extend(logprobs.view(batch, K, -1), n)  # 2·K of them, best first
        ends = candidates.sequences[:, :, n] == ids.end
        ends_well = ends & (torch.arange(2 * K, device=device) < K) & ~done[:, None]  # only the first K may finish
        finished.add(candidates, n, options.length_penalty, ends_well, ended=True)
        best = candidates.scores[:, 0]
        # at most K candidates end, one per beam, so K are left: the first K that go on
        kept = ends.long().argsort(dim=1, stable=True)[:, :K]
        beams = candidates.pick(kept)
        done = done | finished.is_done(best, n, options)
        if done.all() or n == limit:
            break
        reorder(parents.gather(1, kept))
    everywhere = torch.ones(batch, K, dtype=torch.bool, device=device)
    finished.add(beams, n, options.length_penalty, everywhere & ~done[:, None], ended=False)
    return finished.best(options)


@dataclass
class _Beams:
    """M sequences per input with their summed log-probabilities; M is K, or 2·K while candidates are compared."""

    sequences: Tensor  # (B, M, 1 + limit) long, padded
    logprobs: Tensor  # (B, M, limit), of each generated id
    scores: Tensor  # (B, M), their sum

    @classmethod
    def start(cls, batch: int, K: int, limit: int, ids: SpecialIds, device: torch.device | str) -> "_Beams":
        sequences = torch.full((batch, K, 1 + limit), ids.pad, device=device)
        sequences[:, :, 0] = ids.start
        scores = torch.full((batch, K), _UNBORN, device=device)
        scores[:, 0] = 0.0
        return cls(sequences, torch.zeros(batch, K, limit, device=device), scores)

    def pick(self, which: Tensor) -> "_Beams":
        """The beams `which` (B, M') of each input."""
        return _Beams(_pick(self.sequences, which), _pick(self.logprobs, which), self.scores.gather(1, which))

    def extend(self, logprobs: Tensor, n: int) -> tuple["_Beams", Tensor]:
        """The 2·K best continuations by one id, best first, and the beam (B, 2·K) each comes from.

        `logprobs` (B, K, V) of the n-th generated id.
        """
        K, V = logprobs.shape[1:]
        scores, flat = (logprobs + self.scores[:, :, None]).flatten(1).topk(2 * K)
        parents = flat // V
        longer = self.pick(parents)
        longer.sequences[:, :, n] = flat % V
        longer.logprobs[:, :, n - 1] = logprobs.flatten(1).gather(1, flat)
        return _Beams(longer.sequences, longer.logprobs, scores), parents


class _Finished:
    """The K best finished hypotheses of every input, best first; empty places score -inf."""

    def __init__(self, beams: _Beams):
        self.sequences, self.logprobs = beams.sequences.clone(), beams.logprobs.clone()
        # in double, as the reference compares them
        self.scores = torch.full_like(beams.scores, _NEVER, dtype=torch.float64)
        self.lengths = torch.zeros_like(beams.scores, dtype=torch.long)
        self.ended = torch.zeros_like(beams.scores, dtype=torch.bool)

    def add(self, beams: _Beams, length: int, length_penalty: float, which: Tensor, ended: bool) -> None:
        """Let `beams`, those of them that `which` (B, M) marks, take the place of worse hypotheses."""
        if not which.any():
            return
        new = (beams.scores.double() / length**length_penalty).where(which, _NEVER)
        scores = torch.cat([self.scores, new], dim=1)
        # stable, so that of equal ones the earlier stays
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.scores.shape[1]]
        self.scores = scores.gather(1, order)
        self.sequences = _pick(torch.cat([self.sequences, beams.sequences], dim=1), order)
        self.logprobs = _pick(torch.cat([self.logprobs, beams.logprobs], dim=1), order)
        lengths = torch.cat([self.lengths, torch.full_like(new, length, dtype=torch.long)], dim=1)
        self.lengths = lengths.gather(1, order)
        self.ended = torch.cat([self.ended, torch.full_like(which, ended)], dim=1).gather(1, order)

    def is_done(self, best_running: Tensor, length: int, options: GenerationOptions) -> Tensor:
        """Which inputs (B,) need no further step, given the best candidate's sum (B,) at this length."""
        worst = self.scores[:, -1]
        full = worst > _NEVER
        if options.early_stopping is True:
            return full
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = options.max_new_tokens  # the length at which a longer hypothesis would score best
        attainable: Tensor = best_running.double() / length**options.length_penalty
        return full & (worst >= attainable)

    def best(self, options: GenerationOptions) -> Generation:
        def rows(values: Tensor) -> Tensor:
            return values[:, : options.num_return_sequences].flatten(0, 1)

        sequences, logprobs = rows(self.sequences), rows(self.logprobs)
        return _finish(sequences, logprobs, rows(self.scores), rows(self.lengths), rows(self.ended), options)


def _pick(values: Tensor, which: Tensor) -> Tensor:
    """(B, M, T), (B, M') -> (B, M', T)"""
    return values.gather(1, which[:, :, None].expand(-1, -1, values.shape[2]))


def _finish(
    sequences: Tensor, logprobs: Tensor, scores: Tensor, lengths: Tensor, ended: Tensor, options: GenerationOptions
) -> Generation:
    longest = int(lengths.max())
    # the end that the limit forced is not the model's own
    was_cut = ~ended | ((lengths == options.max_new_tokens) & (options.forced_eos_token_id is not None))
    reasons = tuple("length" if cut else "stop" for cut in was_cut.tolist())
    return Generation(sequences[:, : 1 + longest], logprobs[:, :longest], scores.float(), lengths, reasons)
