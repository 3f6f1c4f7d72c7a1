"""Beam search written again, slowly and with lists, from the description of transformers' BeamSearchScorer (4.49).

Nothing is shared with florence2.generation, so that the two check each other.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from florence2.model.florence2 import Florence2Model

Table = Callable[[list[int]], list[float]]
"""Ids so far -> logits of the next."""


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.log(sum(math.exp(x - top) for x in logits)) + top
    return [x - total for x in logits]


def apply_rules(scores: list[float], ids: list[int], options: Any, end: int) -> list[float]:
    scores = list(scores)
    if options.repetition_penalty != 1.0:
        for id in set(ids):
            p = options.repetition_penalty
            scores[id] = scores[id] * p if scores[id] < 0 else scores[id] / p
    n = options.no_repeat_ngram_size
    if n:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        for gram in grams:
            if gram[:-1] == tuple(ids[len(ids) - n + 1 :]):
                scores[gram[-1]] = -math.inf
    generated = len(ids) - 1
    if generated < options.min_new_tokens:
        scores[end] = -math.inf
    for forced, when in ((options.forced_bos_token_id, 0), (options.forced_eos_token_id, options.max_new_tokens - 1)):
        if forced is not None and generated == when:
            scores = [0.0 if id == forced else -math.inf for id in range(len(scores))]
    return scores


def greedy(table: Table, options: Any, start: int, end: int) -> list[int]:
    ids = [start]
    while len(ids) - 1 < options.max_new_tokens and (len(ids) == 1 or ids[-1] != end):
        scores = apply_rules(table(ids), ids, options, end)
        ids.append(max(range(len(scores)), key=scores.__getitem__))
    return ids


def beam_search(table: Table, options: Any, start: int, end: int) -> list[tuple[float, list[int]]]:
    """Hypotheses (score, ids), best first."""
    K, power = options.num_beams, options.length_penalty
    beams = [([start], 0.0)] + [([start], -1e9)] * (K - 1)
    finished: list[tuple[float, list[int]]] = []

    def add(ids: list[int], total: float) -> None:
        score = total / (len(ids) - 1) ** power
        if len(finished) < K or score > min(s for s, _ in finished):
            finished.append((score, ids))
            if len(finished) > K:
                finished.remove(min(finished, key=lambda item: item[0]))

    for length in range(1, options.max_new_tokens + 1):
        candidates = []
        for ids, total in beams:
            scores = apply_rules(log_softmax(table(ids)), ids, options, end)
            candidates += [(total + score, [*ids, id]) for id, score in enumerate(scores)]
        candidates.sort(key=lambda item: -item[0])
        candidates = candidates[: 2 * K]
        beams = []
        for rank, (total, ids) in enumerate(candidates):
            if ids[-1] == end:
                if rank < K:
                    add(ids, total)
            elif len(beams) < K:
                beams.append((ids, total))
        if len(finished) >= K:
            best, worst = candidates[0][0], min(s for s, _ in finished)
            at = options.max_new_tokens if options.early_stopping == "never" and power > 0 else length
            if options.early_stopping is True or worst >= best / at**power:
                return sorted(finished, key=lambda item: -item[0])
    for ids, total in beams:
        add(ids, total)
    return sorted(finished, key=lambda item: -item[0])


def search_slowly(model: Florence2Model, memory: Tensor, options: Any, mask: Tensor | None = None) -> list[list[int]]:
    """Return the rows of a whole generation: every prefix decoded again, without a cache, one input after another."""
    text, rows = model.config.text, []

    def table(ids: list[int]) -> list[float]:
        with torch.no_grad():
            return model.decode(torch.tensor([ids]), single, real)[0, -1].tolist()  # type: ignore[no-any-return]

    for i in range(len(memory)):
        single, real = memory[i : i + 1], None if mask is None else mask[i : i + 1]
        if options.num_beams == 1:
            rows.append(greedy(table, options, text.decoder_start_token_id, text.eos_token_id))
        else:
            best = beam_search(table, options, text.decoder_start_token_id, text.eos_token_id)
            rows += [ids for _, ids in best[: options.num_return_sequences]]
    return rows
