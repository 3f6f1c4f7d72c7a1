"""The rules of the logits on NumPy arrays; see `florence2.generation.rules`.

Dimensions: K sequences of one input, all with n ids after the start id, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from florence2.generation.options import GenerationOptions, SpecialIds, nothing_possible, wrong_result
from florence2.lite.search.arrays import NEVER, Array


def apply_rules(scores: Array, sequences: Array, options: GenerationOptions, ids: SpecialIds) -> Array:
    """Change scores (K, V) of the next id of `sequences` (K, 1 + n), in the reference's order; see `logit_rules`."""
    n = sequences.shape[1] - 1
    if options.repetition_penalty != 1.0:
        penalise_repetition(scores, sequences, options.repetition_penalty)
    if options.no_repeat_ngram_size > 0:
        ban_repeated_ngrams(scores, sequences, options.no_repeat_ngram_size)
    if n < options.min_new_tokens:
        scores[:, ids.end] = NEVER
    for rule in options.extra_rules:
        if rule.applies(n):
            scores = apply_extra(rule, scores, sequences)
    for forced in _forced(n, options):
        scores[:] = NEVER
        scores[:, forced] = 0.0
    return scores


def _forced(n: int, options: GenerationOptions) -> Iterator[int]:
    """Yield the ids that must follow n generated ones; the last has the last word."""
    if n == 0 and options.forced_bos_token_id is not None:
        yield options.forced_bos_token_id
    if n == options.max_new_tokens - 1 and options.forced_eos_token_id is not None:
        yield options.forced_eos_token_id


def penalise_repetition(scores: Array, sequences: Array, penalty: float) -> None:
    """Divide the scores of ids that occurred already by `penalty`; multiply negative ones."""
    seen = np.take_along_axis(scores, sequences, axis=1)
    np.put_along_axis(scores, sequences, np.where(seen < 0, seen * penalty, seen / penalty), axis=1)


def ban_repeated_ngrams(scores: Array, sequences: Array, size: int) -> None:
    """Make ids impossible that would complete an n-gram of `size` ids a second time."""
    length = sequences.shape[1]
    if length < size:
        return
    windows = sliding_window_view(sequences, size, axis=1)  # (K, W, size)
    present = sequences[:, None, length - size + 1 :]  # (K, 1, size - 1): the beginning that the next id completes
    rows, which = np.nonzero((windows[:, :, :-1] == present).all(axis=2))
    scores[rows, windows[rows, which, -1]] = NEVER


def apply_extra(rule: Any, scores: Array, sequences: Array) -> Array:
    """Return the scores that a rule of the caller's makes. Raises OptionError when it returns something else."""
    generated = np.full(len(sequences), sequences.shape[1] - 1)
    changed = rule(scores, sequences, generated)
    if not isinstance(changed, np.ndarray) or changed.shape != scores.shape:
        got = f"an array {changed.shape}" if isinstance(changed, np.ndarray) else type(changed).__name__
        raise wrong_result(rule.name, got, scores.shape)
    return changed


def check_possible(scores: Array, running: Array, enough: int, n: int, options: GenerationOptions) -> None:
    """Raise OptionError when fewer than `enough` of the `running` sequences (K,) have a possible n-th id."""
    if options.extra_rules and ((scores > NEVER).any(axis=1) & running).sum() < enough:
        raise nothing_possible(n, options.extra_rules)
