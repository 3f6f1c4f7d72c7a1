"""Compute the scores of an answer from the log-probabilities of its tokens.

A score is a geometric mean of token probabilities, 0..1. It is not calibrated: 0.9 does not mean that nine of ten such
answers are right.
"""

import math
from collections.abc import Sequence

from florence2.answers.parsing import MARKERS, find_region_tokens
from florence2.inputs.tasks import AnswerKind


def mean_probability(logprobs: Sequence[float]) -> float | None:
    """Return the geometric mean of the probabilities, or None for an empty sequence."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else None


def score_text(token_texts: Sequence[str], token_logprobs: Sequence[float]) -> float | None:
    """Return the score of all generated tokens except the markers around the answer.

    `token_texts` has one item more than `token_logprobs`: it begins with the start id's.
    """
    generated = zip(token_logprobs, token_texts[1:], strict=False)
    return mean_probability([logprob for logprob, text in generated if text not in MARKERS])


def score_regions(kind: AnswerKind, token_texts: Sequence[str], token_logprobs: Sequence[float]) -> list[float | None]:
    """Return the score of each region's location tokens, in the order of `find_regions`."""
    regions = find_region_tokens(kind, token_texts)
    return [mean_probability([token_logprobs[token] for token in tokens]) for tokens in regions]
