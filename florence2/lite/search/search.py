"""Greedy search, sampling and beam search on NumPy arrays; see `florence2.generation.search`.

It knows arrays and no model. Dimensions: B inputs, K sequences that are written side by side for each, n ids that each
has, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from florence2.generation.options import GenerationOptions, SpecialIds
from florence2.lite.search.arrays import NEVER, Array, largest, log_softmax
from florence2.lite.search.rules import apply_rules, check_possible

Step = Callable[[Array], Array]
"""The newest id of every sequence (B·K,) -> float32 logits (B·K, V) of the next id."""
Reorder = Callable[[Array, Array], None]
"""Continue with the inputs kept (B',) of the B alone, and let sequence k of these continue parents[k]: (B'·K,)."""
# All K beams are equal at the start, so only the first may be continued. The reference uses this number, not -inf.
_NOT_STARTED = -1e9
_MOST_DRAW = np.float32(1 - 1e-6)  # below 1 by more than rounding, so that a draw lies below the sum


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """One written answer.

    Attributes:
        ids: (1 + T,) the start id and the generated ones.
        logprobs: (T,), the log-probability of each generated id after the rules, 0 for forced ids.
        score: Their sum / T^length_penalty.
        finish_reason: "stop" where the model ended the answer, "length" where the limit did.
    """

    ids: Array
    logprobs: Array
    score: float
    finish_reason: str


def search(
    step: Step, reorder: Reorder, batch: int, options: GenerationOptions, ids: SpecialIds
) -> list[list[Hypothesis]]:
    """Run the search that `options` ask for on `batch` inputs together.

    Each input is searched as if it were alone, and left out as soon as it is done.

    Returns:
        For each input `num_return_sequences` answers, best first; samples stay in the order in which they were drawn.

    Raises:
        OptionError: Extra rules leave an input nothing to continue with.
    """
    states = [start_search(options, ids) for _ in range(batch)]
    running = states
    for n in range(1, options.max_new_tokens + 1):
        logits = step(np.concatenate([state.newest for state in running]))
        for state, its_logits in zip(running, np.split(logits, len(running)), strict=True):
            state.advance(its_logits)
        kept = np.flatnonzero([not state.done for state in running])
        if len(kept) == 0 or n == options.max_new_tokens:
            break
        parents = np.concatenate([place * options.width + running[place].parents for place in kept])
        if not np.array_equal(parents, np.arange(len(logits))):
            reorder(parents, kept)
        running = [running[place] for place in kept]
    return [state.finish() for state in states]


def start_search(options: GenerationOptions, ids: SpecialIds) -> "ArraySearch":
    """Return the state of a search before its first step."""
    kind = ArraySampling if options.sample else ArrayGreedy if options.num_beams == 1 else ArrayBeamSearch
    return kind(options, ids)


class ArraySearch(ABC):
    """The sequences that are written, and their log-probabilities."""

    def __init__(self, options: GenerationOptions, ids: SpecialIds):
        K = options.width
        self.options, self.ids = options, ids
        self.sequences = np.full((K, 1), ids.start, dtype=np.int64)  # (K, 1 + n)
        self.logprobs = np.zeros((K, 0), dtype=np.float32)  # (K, n), of each generated id
        self.parents = np.arange(K)  # the sequences of the step before that these continue
        self.done = False

    @property
    def newest(self) -> Array:
        """The last id of every sequence (K,)."""
        return self.sequences[:, -1]

    @property
    def generated(self) -> int:
        """How many ids every sequence has after its start id."""
        return self.sequences.shape[1] - 1

    @abstractmethod
    def advance(self, logits: Array) -> None:
        """Choose the next id of every sequence by its `logits` (K, V)."""

    @abstractmethod
    def finish(self) -> list[Hypothesis]:
        """Return the result; sequences that still run were cut by the limit."""

    def _append(self, ids: Array, logprobs: Array) -> None:
        self.sequences = np.concatenate([self.sequences[self.parents], ids[:, None]], axis=1)
        self.logprobs = np.concatenate([self.logprobs[self.parents], logprobs[:, None].astype(np.float32)], axis=1)

    def _reason(self, length: int, ended: bool) -> str:
        # the end that the limit forced is not the model's own
        forced = length == self.options.max_new_tokens and self.options.forced_eos_token_id is not None
        return "stop" if ended and not forced else "length"


class ArrayGreedy(ArraySearch):
    """The likeliest id at every step. The rules see raw logits, and log-probabilities are taken after them."""

    def __init__(self, options: GenerationOptions, ids: SpecialIds):
        super().__init__(options, ids)
        self.lengths = np.zeros(options.width, dtype=np.int64)  # (K,), with the end
        self.ended = np.zeros(options.width, dtype=bool)  # (K,)

    def advance(self, logits: Array) -> None:
        """Append an id to every sequence, which no longer counts after its end."""
        # a copy, because the rules write into it
        scores = apply_rules(np.array(logits, dtype=np.float32), self.sequences, self.options, self.ids)
        check_possible(scores, ~self.ended, int((~self.ended).sum()), 1 + self.generated, self.options)
        scores = log_softmax(scores)
        tokens = self.choose(scores)
        self._append(tokens, scores[np.arange(len(tokens)), tokens])
        self.lengths += ~self.ended
        self.ended |= tokens == self.ids.end
        self.done = bool(self.ended.all())

    def choose(self, scores: Array) -> Array:
        """Choose the next id of every sequence (K,) by log-probabilities (K, V)."""
        likeliest: Array = scores.argmax(axis=1)
        return likeliest

    def finish(self) -> list[Hypothesis]:
        """Return every sequence up to its end."""
        return [self._cut(row, int(length)) for row, length in enumerate(self.lengths)]

    def _cut(self, row: int, length: int) -> Hypothesis:
        logprobs = self.logprobs[row, :length]
        score = float(logprobs.sum()) / float(length) ** self.options.length_penalty
        reason = self._reason(length, bool(self.ended[row]))
        return Hypothesis(self.sequences[row, : 1 + length], logprobs, float(np.float32(score)), reason)


class ArraySampling(ArrayGreedy):
    """An id drawn by its probability at every step: rules, then temperature, top-k, top-p, then the draw.

    A draw is one number in [0, 1), by which the sum of the probabilities is cut. A seed gives the numbers that it gives
    in torch, so that samples are those of the torch engine; without one NumPy's global generator draws.
    """

    def __init__(self, options: GenerationOptions, ids: SpecialIds):
        super().__init__(options, ids)
        self.draws = draw(options.width, options.max_new_tokens, options.seed)  # (K, limit)

    def choose(self, scores: Array) -> Array:
        """Draw the next id of every sequence."""
        options = self.options
        ids, probabilities = drawable(scores, options.temperature, options.top_k, options.top_p)
        sums = probabilities.cumsum(axis=1)  # (K, M)
        goals = self.draws[:, self.generated, None] * sums[:, -1:]
        place = (sums <= goals).sum(axis=1)  # of the first sum above the draw
        return np.take_along_axis(ids, place[:, None], axis=1)[:, 0]


def draw(samples: int, limit: int, seed: int | None) -> Array:
    """Return float32 numbers in [0, 1), (samples, limit): torch's own for a `seed`, by the Mersenne Twister of both."""
    if seed is None:
        return np.minimum(np.random.random_sample((samples, limit)).astype(np.float32), _MOST_DRAW)
    twister = np.random.MT19937()
    twister._legacy_seeding(seed & 0xFFFFFFFF)  # torch seeds it with 32 bits too
    bits = twister.random_raw(samples * limit).reshape(samples, limit) & 0xFFFFFF
    draws: Array = np.minimum(bits.astype(np.float32) / np.float32(1 << 24), _MOST_DRAW)
    return draws


def drawable(scores: Array, temperature: float, top_k: int, top_p: float) -> tuple[Array, Array]:
    """Return the ids that may be drawn and their probabilities, (K, M) each, by log-probabilities (K, V)."""
    ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    if 0 < top_k < scores.shape[1]:
        ids = np.stack([largest(row, top_k) for row in scores])
    elif top_p < 1:
        ids = np.argsort(-scores, axis=1, kind="stable")
    values = np.take_along_axis(scores, ids, axis=1)
    weights = np.exp((values - values.max(axis=1, keepdims=True)) / np.float32(temperature))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    if top_p < 1:
        likelier = probabilities.cumsum(axis=1) - probabilities  # the sum of all likelier ids
        probabilities = np.where(likelier < top_p, probabilities, 0.0)
    return ids, probabilities


class ArrayBeamSearch(ArraySearch):
    """The K likeliest running sequences, and the K best finished ones."""

    def __init__(self, options: GenerationOptions, ids: SpecialIds):
        super().__init__(options, ids)
        self.sums = np.full(options.num_beams, _NOT_STARTED, dtype=np.float32)  # (K,)
        self.sums[0] = 0.0
        self.finished: list[Hypothesis] = []  # at most K, best first

    def advance(self, logits: Array) -> None:
        """Compare 2·K candidates: of those that end the first K may finish, and K of the rest continue."""
        K = self.options.num_beams
        # with beams the rules see log-probabilities, in greedy search raw logits, as in the reference
        scores = apply_rules(log_softmax(logits), self.sequences, self.options, self.ids)
        check_possible(scores, np.ones(K, dtype=bool), 1, 1 + self.generated, self.options)
        # as many as may be needed: at most K of them end, one a beam, so at least K continue
        sums = (scores + self.sums[:, None]).ravel()
        flat = largest(sums, 2 * K)
        self.parents, tokens = np.divmod(flat, scores.shape[1])  # (2·K,): beam and id of each candidate
        self._append(tokens, scores.ravel()[flat])
        self.sums = sums[flat]
        ends = tokens == self.ids.end
        # as in the reference, an end that ranks below the first K candidates is dropped
        self._add_finished(np.flatnonzero(ends[:K]), ended=True)
        self.done = self._is_done(float(self.sums[0]))
        self._keep(np.flatnonzero(~ends)[:K])

    def finish(self) -> list[Hypothesis]:
        """Return the result; running sequences that the limit cut compete with the finished ones."""
        if not self.done:
            self._add_finished(np.arange(len(self.sums)), ended=False)
        # extra rules may leave fewer than K beams that are possible at all
        nothing = Hypothesis(self.sequences[0, :1], self.logprobs[0, :0], NEVER, "length")
        count = self.options.num_return_sequences
        return [*self.finished, *[nothing] * count][:count]

    def _keep(self, which: Array) -> None:
        """Continue with the candidates `which` (K,) alone."""
        self.sequences, self.logprobs = self.sequences[which], self.logprobs[which]
        self.sums, self.parents = self.sums[which], self.parents[which]

    def _add_finished(self, which: Array, ended: bool) -> None:
        """Let the candidates `which` take the place of worse hypotheses; of equal ones the earlier stays."""
        length = self.generated
        scores = {int(row): float(self.sums[row]) / float(length) ** self.options.length_penalty for row in which}
        new = [
            Hypothesis(self.sequences[row], self.logprobs[row], score, self._reason(length, ended))
            for row, score in scores.items()
            if score > NEVER
        ]
        self.finished = sorted([*self.finished, *new], key=lambda each: -each.score)[: self.options.num_beams]

    def _is_done(self, best_running: float) -> bool:
        """Return whether no further step is needed, given the sum of the best candidate."""
        options = self.options
        if len(self.finished) < options.num_beams:
            return False
        if options.early_stopping is True:
            return True
        # "never" looks where a longer hypothesis would score best
        longest = options.early_stopping == "never" and options.length_penalty > 0
        length = options.max_new_tokens if longest else self.generated
        worst: float = self.finished[-1].score
        return bool(worst >= best_running / float(length) ** options.length_penalty)
