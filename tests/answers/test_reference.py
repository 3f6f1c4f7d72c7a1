"""The reference's reading of a text, and its score lookup."""

import math
import time

import pytest

from florence2.answers.reference import reference_answer, reference_scores

BOX = "<loc_1><loc_2><loc_3><loc_4>"


def test_text_keeps_its_padding() -> None:
    assert reference_answer("text", "</s><s>a cat</s><pad>", (10, 10)) == "a cat<pad>"


def test_labels_lose_letters_after_they_were_stripped() -> None:
    assert reference_answer("boxes", f"日 cat{BOX}", (1000, 1000))["labels"] == [" cat"]
    assert reference_answer("polygons", f"{BOX}", (1000, 1000))["labels"] == [""]


def test_scores_of_a_text_without_gaps_are_those_of_the_location_tokens() -> None:
    texts = ["</s>", "<s>", "car", *["<loc_1>"] * 4, "wheel", *["<loc_2>"] * 4, "</s>"]
    probabilities = [1.0, 0.9, 0.5, 0.5, 0.5, 0.5, 0.9, 0.8, 0.8, 0.8, 0.8, 0.9]
    assert reference_scores(texts, [math.log(p) for p in probabilities]) == pytest.approx([0.5, 0.8])


def test_text_between_phrases_moves_the_lookup_forward() -> None:
    """By hand: "<od>" is at 0..4, "ab" at 4..6, the four locations of 7 letters at 6..34.

    The phrase "od>ab..." begins at 1, but the lookup takes it to begin at 0. It therefore looks at 5..33, which touches
    "ab" and all four locations: (0.1 * 0.5^4)^(1/5).
    """
    texts = ["</s>", "<od>", "ab", *["<loc_1>"] * 4]
    logprobs = [math.log(p) for p in (0.9, 0.1, 0.5, 0.5, 0.5, 0.5)]
    assert reference_scores(texts, logprobs) == pytest.approx([(0.1 * 0.5**4) ** (1 / 5)])


def test_lengths_of_phrases_are_summed_not_their_positions() -> None:
    """By hand: in "a<loc_1><loc_2>b" and four locations, the phrase "loc_2>b..." begins at 9 and has 35 letters.

    The lookup takes it to begin at 0, so its locations, at 7..35 of it, are looked for at 7..35 of the text. Those
    touch the first two locations (1..8, 8..15), "b" (15..16) and three of its own. The second phrase, "c..." of 29
    letters, is taken to begin at 35: 36..64 touches the third and fourth location of the first (30..37, 37..44), "c"
    (44..45) and three of its own.
    """
    texts = ["</s>", "a", "<loc_1>", "<loc_2>", "b", *["<loc_3>"] * 4, "c", *["<loc_4>"] * 4]
    logprobs = [-0.01 * 2**i for i in range(len(texts) - 1)]
    expected = [math.exp(sum(logprobs[1:7]) / 6), math.exp(sum(logprobs[6:12]) / 6)]
    assert reference_scores(texts, logprobs) == pytest.approx(expected)


def test_scores_of_long_answers_take_linear_time() -> None:
    """3,500 boxes of 17,500 tokens; every token compared with every box takes 5 s."""
    texts = ["</s>", *["a", *["<loc_1>"] * 4] * 3500]
    start = time.process_time()
    assert reference_scores(texts, [0.0] * (len(texts) - 1)) == [1.0] * 3500
    assert time.process_time() - start < 1
