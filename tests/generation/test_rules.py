"""The rules of the logits, one by one."""

import math

import pytest
import torch
from torch import Tensor

from florence2.generation.rules import ForcedId, MinNewTokens, NoRepeatNgram, RepetitionPenalty, Rule

PAD = 8


def call(rule: Rule, scores: Tensor, ids: list[list[int]]) -> Tensor:
    """Apply the rule to sequences of these ids, with room for at least three more."""
    room = 3 + max(map(len, ids))
    sequences = torch.tensor([[*row, *[PAD] * (room - len(row))] for row in ids])
    generated = torch.tensor([len(row) - 1 for row in ids])
    return rule(scores, sequences, generated)


def banned(rule: Rule, *ids: list[int]) -> list[list[int]]:
    scores = call(rule, torch.zeros(len(ids), 9), list(ids))
    return [(row == -math.inf).nonzero().flatten().tolist() for row in scores]


def test_no_repeat_ngram_bans_only_what_would_repeat() -> None:
    assert banned(NoRepeatNgram(3), [5, 6, 7, 5, 6], [5, 6, 7, 6, 5], [6, 5, 6, 5, 6]) == [[7], [], [5]]


def test_a_second_window_with_the_same_beginning_does_not_free_what_the_first_banned() -> None:
    assert banned(NoRepeatNgram(3), [5, 6, 7, 5, 6, 8, 5, 6]) == [[7, 8]]


def test_sequences_of_different_lengths() -> None:
    assert banned(NoRepeatNgram(2), [4, 5, 4], [4, 5, 4, 5, 6, 4]) == [[5], [5]]


def test_padding_is_no_part_of_an_ngram() -> None:
    """The newest id is the padding's; what stands behind it is not written yet."""
    assert banned(NoRepeatNgram(2), [4, PAD]) == [[]]
    assert banned(NoRepeatNgram(1), [4, 5]) == [[4, 5]]


@pytest.mark.parametrize(("size", "length"), [(3, 3), (2, 2), (1, 1), (4, 4)])
def test_no_repeat_ngram_begins_with_the_first_whole_one(size: int, length: int) -> None:
    rule = NoRepeatNgram(size)
    assert [rule.applies(generated) for generated in (length - 2, length - 1)] == [False, True]
    assert banned(rule, [4] * length) == [[4]]


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores_once() -> None:
    rule = RepetitionPenalty(2.0)
    scores = torch.tensor([[2.0, -2.0, 3.0, -3.0, 0.0, 0.0, 0.0, 0.0, 5.0]])
    assert call(rule, scores, [[0, 1, 0, 0]])[0].tolist() == [1.0, -4.0, 3.0, -3.0, 0.0, 0.0, 0.0, 0.0, 5.0]
    assert rule.applies(0)


def test_repetition_penalty_touches_only_what_was_written() -> None:
    """The places after it hold padding, and the start id is not 0: neither 0 nor padding has occurred."""
    scores = torch.tensor([[2.0, 2.0, 3.0, -3.0, 4.0, -5.0, 6.0, 7.0, 8.0]])
    assert call(RepetitionPenalty(2.0), scores, [[4, 1]])[0].tolist() == [2.0, 1.0, 3.0, -3.0, 2.0, -5.0, 6.0, 7.0, 8.0]


def test_min_new_tokens_counts_generated_ids_only() -> None:
    rule = MinNewTokens(2, end=1)
    assert [rule.applies(generated) for generated in (0, 1, 2)] == [True, True, False]
    assert banned(rule, [0, 5]) == [[1]]


def test_forced_ids_leave_nothing_else() -> None:
    rule = ForcedId(3, generated=1)
    assert [rule.applies(generated) for generated in (0, 1, 2)] == [False, True, False]
    scores = call(rule, torch.ones(1, 5), [[0, 4]])
    assert scores.tolist() == [[-math.inf, -math.inf, -math.inf, 0.0, -math.inf]]
