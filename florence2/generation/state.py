"""What a search knows between two steps, what the rules make of its scores, and what it returns in the end."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.generation.options import GenerationOptions, nothing_possible, wrong_result
from florence2.generation.options import SpecialIds as SpecialIds
from florence2.generation.rules import ForcedId, MinNewTokens, NoRepeatNgram, RepetitionPenalty, Rule
from florence2.model.trace import NO_TRACE, Trace

NEVER = float("-inf")
_FIRST_ROOM = 64  # ids; every step of a search reads all the room that its sequences have
State = TypeVar("State", bound="SearchState")


@dataclass(frozen=True)
class Generation:
    """The result of a search: `num_return_sequences` rows R an input, best first; samples as they were drawn.

    Attributes:
        sequences: (B·R, 1 + T) long: the start id, the generated ids, then padding.
        token_logprobs: (B·R, T), the log-probability of each generated id after the rules, 0 for forced ids and
            padding. Those of samples are taken before temperature, top-k and top-p: they are the model's own, so that
            answers of different settings can be compared.
        sequence_scores: (B·R,), their sum / length^length_penalty.
        lengths: (B·R,) long, how many ids were generated.
        finish_reasons: "stop" where the model ended the sequence, "length" where the limit did.
        forced_logprobs: (B·R, T), the log-probability of each generated id by teacher forcing, before any rule; None
            where nobody asked for it (see `generation.engine.forced`).
        location_probabilities: (B·R, T, 1000), the probability of every location at each place, likewise.
    """

    sequences: Tensor
    token_logprobs: Tensor
    sequence_scores: Tensor
    lengths: Tensor
    finish_reasons: tuple[str, ...]
    forced_logprobs: Tensor | None = None
    location_probabilities: Tensor | None = None

    def split(self, inputs: int) -> list["Generation"]:
        """Return the results of the `inputs` B one by one, each cut to its own longest row."""
        each = len(self.sequences) // inputs
        return [self._part(slice(start, start + each)) for start in range(0, len(self.sequences), each)]

    def _part(self, rows: slice) -> "Generation":
        lengths = self.lengths[rows]
        T = int(lengths.max())
        return Generation(
            self.sequences[rows, : 1 + T],
            self.token_logprobs[rows, :T],
            self.sequence_scores[rows],
            lengths,
            self.finish_reasons[rows],
            None if self.forced_logprobs is None else self.forced_logprobs[rows, :T],
            None if self.location_probabilities is None else self.location_probabilities[rows, :T],
        )


def logit_rules(options: GenerationOptions, ids: SpecialIds) -> list[Rule]:
    """Return the rules that `options` switch on, in the reference's order: the forced end overrides all others.

    Extra rules see what the built-in ones banned, so they have the last word on words; but they come before the forced
    ids, because the ends of an answer are the search's: a finish_reason rests on the end that a limit forces.
    """
    rules: list[Rule] = []
    if options.repetition_penalty != 1.0:
        rules.append(RepetitionPenalty(options.repetition_penalty))
    if options.no_repeat_ngram_size > 0:
        rules.append(NoRepeatNgram(options.no_repeat_ngram_size))
    if options.min_new_tokens > 0:
        rules.append(MinNewTokens(options.min_new_tokens, ids.end))
    rules += options.extra_rules
    if options.forced_bos_token_id is not None:
        rules.append(ForcedId(options.forced_bos_token_id, 0, "forced_bos_token"))
    if options.forced_eos_token_id is not None:
        rules.append(ForcedId(options.forced_eos_token_id, options.max_new_tokens - 1, "forced_eos_token"))
    return rules


@dataclass(frozen=True)
class SearchState(abc.ABC):
    """The state between two steps, a value; `advance` makes the next one.

    On an accelerator, and wherever a step is recorded, `advance` has no control flow that depends on data, and no shape
    changes; only the step numbers select the rules. A step can therefore be captured as a CUDA graph and replayed
    (`fast.cuda.recorded.slots`). Inputs that joined later are at a step number of their own (`generation.engine`).
    """

    by_position: ClassVar[tuple[str, ...]]
    """The fields (B, K, 1 + room) with an id at each position, and (B, K, room) with a number of each generated id."""

    options: GenerationOptions
    ids: SpecialIds
    generated: Tensor  # (B,) long: how many ids the running sequences have
    newest: Tensor  # (B, K) long: the last id of each running sequence
    parents: Tensor  # (B, K) long: the sequences of the step before that they continue
    done: Tensor  # (B,) bool: inputs whose result will not change any more

    @abc.abstractmethod
    def advance(self, logits: Tensor, n: int | Sequence[int], trace: Trace = NO_TRACE) -> "SearchState":
        """Choose the n-th id of every sequence by its `logits` (B·K, V).

        n counts from 1; a sequence of numbers has one for each input. Without extra rules, which may need to know whose
        number it is, it may be all numbers that any input can have.
        """

    @abc.abstractmethod
    def finish(self) -> Generation:
        """Return the result; sequences that still run were cut by the limit."""

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by the name of its field; the first dimension counts inputs."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def room(self) -> int:
        """How many ids each sequence has room for, up to the limit."""
        return self._sequences.shape[2] - 1

    def written(self, row: int) -> list[int]:
        """Return the ids so far, the start id first, of the first sequence of an input."""
        ids: list[int] = self._sequences[row, 0, : 1 + int(self.generated[row])].tolist()
        return ids

    @property
    def _sequences(self) -> Tensor:
        """The ids of all sequences (B, K, 1 + room)."""
        sequences: Tensor = getattr(self, self.by_position[0])
        return sequences

    def with_room(self: State, room: int) -> State:
        """Return this state with room for `room` ids a sequence, as many as any has or more."""
        resized: dict[str, Any] = {name: _resized(getattr(self, name), room, self.ids.pad) for name in self.by_position}
        return replace(self, **resized)

    def with_room_for(self: State, n: int) -> State:
        """Return this state with room for the n-th id; the room doubles, so that it rarely changes."""
        room = _FIRST_ROOM
        while room < n:
            room *= 2
        room = min(room, self.options.max_new_tokens)
        return self if room == self.room else self.with_room(room)

    def pick(self: State, rows: Tensor) -> State:
        """Return the state of the inputs `rows` (B',) alone."""
        picked: dict[str, Any] = {name: value[rows] for name, value in self.tensors().items()}
        return replace(self, **picked)

    def put(self: State, rows: Tensor, part: State) -> State:
        """Return this state with the inputs `rows` (B',) as in `part`."""
        merged: dict[str, Any] = {
            name: getattr(self, name).index_copy(0, rows, value) for name, value in part.tensors().items()
        }
        return replace(self, **merged)

    def join(self: State, other: State) -> State:
        """Return the state of the inputs of both, which have the same options; the others come last."""
        joined: dict[str, Any] = {
            name: torch.cat([value, other.tensors()[name]]) for name, value in self.tensors().items()
        }
        return replace(self, **joined)

    def _apply_rules(self, scores: Tensor, sequences: Tensor, n: int | Sequence[int], trace: Trace) -> Tensor:
        """Apply the rules to `scores` (R, V) of the n-th id of `sequences` (R, 1 + room), R a multiple of B."""
        beams = len(sequences) // len(self.generated)
        generated = self.generated.repeat_interleave(beams)
        numbers = [n] * len(self.generated) if isinstance(n, int) else n
        for rule in logit_rules(self.options, self.ids):
            before = scores.clone() if trace.wants(f"search.banned.{rule.name}") else None
            due = [rule.applies(number - 1) for number in numbers]
            if all(due) or (any(due) and getattr(rule, "by_row", False)):
                scores = _apply(rule, scores, sequences, generated)
            elif any(due):
                rows = torch.tensor(due, device=scores.device).repeat_interleave(beams).nonzero()[:, 0]
                scores[rows] = _apply(rule, scores[rows], sequences[rows], generated[rows])
            scores = _show_rule(trace, rule, before, scores)
        if self.options.extra_rules:  # the built-in rules always leave something
            self._check_possible(scores, numbers)
        return scores

    def _check_possible(self, scores: Tensor, numbers: Sequence[int]) -> None:
        """Raise OptionError when the rules left an input that still runs without any possible n-th id."""
        possible = (scores > NEVER).any(dim=-1).view(len(self.done), -1)  # (B, K)
        stuck = self._is_stuck(possible) & ~self.done
        if stuck.any():
            raise nothing_possible(numbers[int(stuck.nonzero()[0, 0])], self.options.extra_rules)

    def _is_stuck(self, possible: Tensor) -> Tensor:
        """Return the inputs (B,) that cannot continue, by whether each sequence can (B, K): one beam is enough."""
        return ~possible.any(dim=1)


def may_ask(flags: Tensor) -> bool:
    """Return whether a step may ask for values and go by them: on a CPU, where nobody records the step."""
    return flags.device.type == "cpu" and not torch._C._len_torch_dispatch_stack()


def _resized(values: Tensor, room: int, pad: int) -> Tensor:
    """Cut or pad ids (B, K, 1 + old room), or numbers (B, K, old room), to `room`."""
    width, fill = (room, 0.0) if values.is_floating_point() else (1 + room, pad)
    return values[:, :, :width] if width <= values.shape[2] else F.pad(values, (0, width - values.shape[2]), value=fill)


def _apply(rule: Rule, scores: Tensor, sequences: Tensor, generated: Tensor) -> Tensor:
    """Return the scores that `rule` makes of `scores`. Raises OptionError when it returns something else."""
    changed = rule(scores, sequences, generated)
    if not isinstance(changed, Tensor) or changed.shape != scores.shape:
        got = f"a tensor {tuple(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
        raise wrong_result(rule.name, got, scores.shape)
    return changed


def _show_rule(trace: Trace, rule: Rule, before: Tensor | None, after: Tensor) -> Tensor:
    """Show what a rule made impossible, as (row, id) pairs (bans, 2), and the scores (B·K, V) after it, at every step.

    The pairs of a forced id would be the whole vocabulary, so they are left out. The run continues with a copy of the
    scores that are shown, because the next rule may change its scores in place.
    """
    if before is not None and not isinstance(rule, ForcedId):
        trace(f"search.banned.{rule.name}", ((after == NEVER) & (before != NEVER)).nonzero())
    name = f"scores.{rule.name}"
    return trace(name, after).clone() if trace.wants(name) else after


def show_choice(
    trace: Trace, tokens: Tensor, parents: Tensor, sums: Tensor, finished: Tensor, survivors: Tensor, done: Tensor
) -> None:
    """Show one step of the search: its M candidates (B, M), best first, and their fate.

    `parents` are the beams that they continue, `sums` their summed log-probabilities, `finished` those that became
    hypotheses; `survivors` (B, K) are the candidates that continue, as the beams 0 to K - 1; `done` (B,).
    """
    trace("search.candidates.tokens", tokens)
    trace("search.candidates.parents", parents)
    trace("search.candidates.sums", sums)
    trace("search.finished", finished)
    trace("search.survivors", survivors)
    trace("search.done", done)


def finish_search(
    sequences: Tensor, logprobs: Tensor, scores: Tensor, lengths: Tensor, ended: Tensor, options: GenerationOptions
) -> Generation:
    """Cut the rows of all results to the longest, and say how each ended."""
    longest = int(lengths.max())
    # the end that the limit forced is not the model's own
    was_cut = ~ended | ((lengths == options.max_new_tokens) & (options.forced_eos_token_id is not None))
    reasons = tuple("length" if cut else "stop" for cut in was_cut.tolist())
    return Generation(sequences[:, : 1 + longest], logprobs[:, :longest], scores.float(), lengths, reasons)
