"""The bookkeeping of a step of beam search in one kernel: `generation.search.BeamSearch.settle`.

A program does one input: which of its 2·K candidates finish, the K best hypotheses, the K that continue, and whether
the input is done. Orders are stable, scores double, and NaN is above all numbers, as in torch's sorts, so the results
are those of the plain code to the bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence2.fast.cuda.kernels.availability import on_device_of

_CHUNK = 128  # ids that are copied at a time
_NOT_READ = ("newest", "parents", "sums")  # of the step before


class Beams(NamedTuple):
    """The tensors of a `BeamSearch` that a step changes."""

    generated: Tensor  # (B,) long
    newest: Tensor  # (B, K) long
    parents: Tensor  # (B, K) long
    done: Tensor  # (B,) bool
    sequences: Tensor  # (B, K, 1 + room) long
    logprobs: Tensor  # (B, K, room)
    sums: Tensor  # (B, K)
    hypotheses: Tensor  # (B, K, 1 + room) long
    hypothesis_logprobs: Tensor  # (B, K, room)
    scores: Tensor  # (B, K) double
    lengths: Tensor  # (B, K) long
    ended: Tensor  # (B, K) bool


def settle(
    beams: Beams, powers: Tensor, candidates: tuple[Tensor, Tensor, Tensor, Tensor], end: int, early: bool, longest: int
) -> Beams:
    """Return the beams after a step.

    `candidates` are sums, parents, ids and log-probabilities of the step, (B, 2·K) each, best first; `powers` (B, 1 +
    limit) double. With `early`, K hypotheses are enough; else the best running sequence is compared with the worst
    hypothesis, at the length that it has, or at `longest` where that is not 0.
    """
    B, K = beams.newest.shape
    old = Beams(*(tensor.contiguous() for tensor in beams))
    new = Beams(*(torch.empty_like(tensor) for tensor in old))
    sums, parents, ids, chosen = (tensor.contiguous() for tensor in candidates)
    with on_device_of(sums):
        _settle[(B,)](
            *(_as_bytes(getattr(old, name)) for name in Beams._fields if name not in _NOT_READ),
            *(*map(_as_bytes, new), sums, parents, ids, chosen, powers, powers.stride(0)),
            *(K, old.logprobs.shape[2], end, longest),
            EARLY=early,
            LONGEST=longest > 0,
            BEAMS=triton.next_power_of_2(K),
            CANDIDATES=triton.next_power_of_2(2 * K),
            ALL=triton.next_power_of_2(3 * K),
            CHUNK=_CHUNK,
        )
    return new


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor


@triton.jit
def _finished_score(i, b, K, done, scores_ptr, sums_ptr, ids_ptr, power, end):
    """Scores of K hypotheses and then 2·K candidates, those at the places i; -inf where a candidate does not finish."""
    old = tl.load(scores_ptr + b * K + i, mask=i < K, other=float("-inf"))
    c = i - K
    candidate = (c >= 0) & (c < 2 * K)
    total = tl.load(sums_ptr + b * 2 * K + c, mask=candidate).to(tl.float64)
    ends = tl.load(ids_ptr + b * 2 * K + c, mask=candidate) == end
    # an end that ranks below the first K candidates is dropped
    well = candidate & ends & (c < K) & (done == 0)
    return tl.where(i < K, old, tl.where(well, total / power, float("-inf")))


@triton.jit
def _settle(
    generated_ptr,
    done_ptr,
    sequences_ptr,
    logprobs_ptr,
    hypotheses_ptr,
    hypothesis_logprobs_ptr,
    scores_ptr,
    lengths_ptr,
    ended_ptr,
    new_generated_ptr,
    new_newest_ptr,
    new_parents_ptr,
    new_done_ptr,
    new_sequences_ptr,
    new_logprobs_ptr,
    new_sums_ptr,
    new_hypotheses_ptr,
    new_hypothesis_logprobs_ptr,
    new_scores_ptr,
    new_lengths_ptr,
    new_ended_ptr,
    candidate_sums_ptr,
    candidate_parents_ptr,
    candidate_ids_ptr,
    candidate_logprobs_ptr,
    powers_ptr,
    powers_b,
    K,
    room,
    end,
    longest,
    EARLY: tl.constexpr,
    LONGEST: tl.constexpr,
    BEAMS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    ALL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(generated_ptr + b) + 1
    done = tl.load(done_ptr + b)
    power = tl.load(powers_ptr + b * powers_b + length)
    beam = tl.arange(0, BEAMS)
    kept = beam < K
    first = b * K
    first_candidate = b * 2 * K

    # hypotheses: place i has as many better or earlier equal ones above it as its rank says
    i = tl.arange(0, ALL)
    mine = _finished_score(i, b, K, done, scores_ptr, candidate_sums_ptr, candidate_ids_ptr, power, end)
    is_nan = mine != mine
    above = (mine[None, :] > mine[:, None]) | (is_nan[None, :] & ~is_nan[:, None])
    equal = (mine[None, :] == mine[:, None]) | (is_nan[None, :] & is_nan[:, None])
    ahead = (above | (equal & (i[None, :] < i[:, None]))) & (i < 3 * K)[None, :]
    rank = tl.sum(ahead.to(tl.int32), axis=1)
    taken = (rank[None, :] == beam[:, None]) & (i < 3 * K)[None, :]
    source = tl.sum(tl.where(taken, i[None, :], 0), axis=1)  # (BEAMS,): which of the 3·K becomes hypothesis `beam`
    score = tl.sum(tl.where(taken, mine[None, :], 0.0), axis=1)
    is_old = source < K
    candidate = tl.where(is_old, 0, source - K)
    old_place = first + tl.where(is_old, source, 0)
    tl.store(new_scores_ptr + first + beam, score, mask=kept)
    old_length = tl.load(lengths_ptr + old_place, mask=kept)
    tl.store(new_lengths_ptr + first + beam, tl.where(is_old, old_length, length), mask=kept)
    old_ended = tl.load(ended_ptr + old_place, mask=kept)
    tl.store(new_ended_ptr + first + beam, tl.where(is_old, old_ended, 1).to(tl.uint8), mask=kept)

    # running sequences: the first K candidates that do not end. Every beam ends once at most, so at least K of the 2·K
    # do not, and nothing after them counts
    c = tl.arange(0, CANDIDATES)
    ends = tl.load(candidate_ids_ptr + first_candidate + c, mask=c < 2 * K) == end
    before = c[None, :] < c[:, None]
    ahead = (~ends[None, :] & (before | ends[:, None])) | (ends[None, :] & ends[:, None] & before)
    rank = tl.sum(ahead.to(tl.int32), axis=1)
    survivor = tl.sum(tl.where(rank[None, :] == beam[:, None], c[None, :], 0), axis=1)  # (BEAMS,)
    survivor_place = first_candidate + survivor
    newest = tl.load(candidate_ids_ptr + survivor_place, mask=kept)
    parent = tl.load(candidate_parents_ptr + survivor_place, mask=kept)
    total = tl.load(candidate_sums_ptr + survivor_place, mask=kept)
    logprob = tl.load(candidate_logprobs_ptr + survivor_place, mask=kept)
    tl.store(new_newest_ptr + first + beam, newest, mask=kept)
    tl.store(new_parents_ptr + first + beam, parent, mask=kept)
    tl.store(new_sums_ptr + first + beam, total, mask=kept)

    # a hypothesis copies an old one, or the parent of the candidate that finished, and the candidate's id
    finished_id = tl.load(candidate_ids_ptr + first_candidate + candidate, mask=kept)
    finished_parent = tl.load(candidate_parents_ptr + first_candidate + candidate, mask=kept)
    finished_logprob = tl.load(candidate_logprobs_ptr + first_candidate + candidate, mask=kept)
    for start in range(0, room + 1, CHUNK):
        t = start + tl.arange(0, CHUNK)
        inside = kept[:, None] & (t <= room)[None, :]
        target = (first + beam)[:, None] * (room + 1) + t[None, :]
        running = (first + parent)[:, None] * (room + 1) + t[None, :]
        ids = tl.load(sequences_ptr + running, mask=inside)
        tl.store(new_sequences_ptr + target, tl.where((t == length)[None, :], newest[:, None], ids), mask=inside)
        running = (first + finished_parent)[:, None] * (room + 1) + t[None, :]
        ids = tl.load(sequences_ptr + running, mask=inside & ~is_old[:, None])
        ids = tl.where((t == length)[None, :], finished_id[:, None], ids)
        kept_ids = tl.load(hypotheses_ptr + old_place[:, None] * (room + 1) + t[None, :], mask=inside & is_old[:, None])
        tl.store(new_hypotheses_ptr + target, tl.where(is_old[:, None], kept_ids, ids), mask=inside)
    for start in range(0, room, CHUNK):
        t = start + tl.arange(0, CHUNK)
        inside = kept[:, None] & (t < room)[None, :]
        target = (first + beam)[:, None] * room + t[None, :]
        at_end = (t == length - 1)[None, :]
        values = tl.load(logprobs_ptr + (first + parent)[:, None] * room + t[None, :], mask=inside)
        tl.store(new_logprobs_ptr + target, tl.where(at_end, logprob[:, None], values), mask=inside)
        running = (first + finished_parent)[:, None] * room + t[None, :]
        values = tl.load(logprobs_ptr + running, mask=inside & ~is_old[:, None])
        values = tl.where(at_end, finished_logprob[:, None], values)
        kept_values = tl.load(
            hypothesis_logprobs_ptr + old_place[:, None] * room + t[None, :], mask=inside & is_old[:, None]
        )
        tl.store(new_hypothesis_logprobs_ptr + target, tl.where(is_old[:, None], kept_values, values), mask=inside)

    # done: K hypotheses are finished, and no running sequence can become better than the worst
    worst = tl.sum(tl.where(beam == K - 1, score, 0.0), axis=0)
    full = worst > float("-inf")
    if not EARLY:
        at = length
        if LONGEST:
            at = length * 0 + longest
        best = tl.load(candidate_sums_ptr + first_candidate).to(tl.float64)
        full = full & (worst >= best / tl.load(powers_ptr + b * powers_b + at))
    tl.store(new_done_ptr + b, ((done != 0) | full).to(tl.uint8))
    tl.store(new_generated_ptr + b, length)
