"""Rate an answer by the probabilities of its tokens: by the reference's score, and by a confidence to threshold.

A *score* is a geometric mean of token probabilities. A location's probability is spread over neighbouring bins, so the
scores of right boxes are low, and no usual threshold fits them.

A *confidence* is how probable it is that a region, or a text, is right. It comes from the model's own probabilities
along the finished answer (`Likelihoods`), so it does not depend on the search that found the answer. Of a region it is

    P(label) x the least P(near) of its locations

P(label) is the product of the probabilities of the label's tokens. P(near) is the probability of all bins at most 4
bins plus 4 % of the region's width (of x) or height (of y) away from the location that was written: an edge that is
really there is seen so sharply. The points of an outline may lie anywhere along it, so there it is 30 % of the extent.
A region is as sure as its least sure location, however many it has.
Of a text the confidence is the probability of all its tokens, the end included: a text is right when it is exactly
right, so one that was cut off gets 0. These raw numbers rank answers; a `Calibration` turns them into frequencies.
docs/confidence.md compares other formulas.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from florence2.answers.parsing import MARKERS, RegionShape, WrittenRegion, find_region_tokens, find_written
from florence2.errors import OptionError, plain, shown
from florence2.inputs.coordinates import NUM_BINS
from florence2.inputs.tasks import AnswerKind

REACH: Mapping[RegionShape, tuple[int, float]] = {"box": (4, 0.04), "quad": (4, 0.04), "polygon": (0, 0.3)}
"""By how many bins, and by what share of the region's width or height besides, a location may be off."""
END = "</s>"
"""The token that ends an answer."""
_UNCOUNTED = ("<s>", "<pad>")
"""The markers that say nothing about a text; its end, `</s>`, says that it is complete."""


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """What the model itself, without any rule of the search, thinks of each of the T generated tokens of an answer.

    Attributes:
        logprobs: (T,) natural log-probabilities of the tokens, given those before them.
        locations: (T, 1000) probabilities of the location bins at each token's place.
    """

    logprobs: np.ndarray
    locations: np.ndarray


class Parts(NamedTuple):
    """The parts of a region's raw confidence.

    `label` is the probability of its label; `near`, one for each location token, that of the bins near it. `tokens` are
    the indices of the location tokens, as in `find_region_tokens`.
    """

    label: float
    near: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def raw(self) -> float:
        """The raw confidence, 0..1."""
        return self.label * min(self.near, default=1.0)


Table: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Raw confidences, which rise strictly from 0 to 1, and their frequencies, which rise strictly too."""


@dataclass(frozen=True)
class Calibration:
    """Turns raw confidences into frequencies, by a table for each kind of answer, and for tasks by their tokens.

    Between its points a table is linear, so a calibrated confidence ranks answers as the raw one does.

    `weights` are the sum and the norm of the model's weights that it was fitted to, None where nobody says.
    """

    tables: Mapping[str, Table]
    weights: tuple[float, float] | None = None

    def knows(self, *keys: str) -> bool:
        """Return whether there is a table for one of the `keys`."""
        return any(key in self.tables for key in keys)

    def __call__(self, raw: float, *keys: str) -> float:
        """Return the frequency for a raw confidence by the first of the `keys` with a table, else the raw value."""
        table = next((self.tables[key] for key in keys if key in self.tables), None)
        return raw if table is None else float(np.interp(raw, *table))


NO_CALIBRATION = Calibration({})


def check_least(least: Any) -> float:
    """Return a threshold of confidence as a float. Raises OptionError unless it is a number from 0 to 1."""
    number = plain(least)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
        raise OptionError(f"The least confidence is {shown(least)}; it must be a number from 0 to 1.")
    return float(number)


def is_sure(region: Any, least: float) -> bool:
    """Return whether a region's confidence is `least` or more. Raises OptionError where it has none."""
    if region.confidence is None:
        raise OptionError(
            "The regions have no confidence to compare with the threshold; answer again without confidence=False and "
            "without patches of the decoder's steps."
        )
    return bool(region.confidence >= least)


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


def rate_text(token_texts: Sequence[str], likelihoods: Likelihoods) -> float | None:
    """Return the raw confidence of a text, None for one that was cut off; `token_texts` begins with the start id's."""
    if len(token_texts) < 2 or token_texts[-1] != END:
        return None
    generated = zip(likelihoods.logprobs.tolist(), token_texts[1:], strict=True)
    return _probability(sum(logprob for logprob, text in generated if text not in _UNCOUNTED))


def rate_regions(kind: AnswerKind, token_texts: Sequence[str], likelihoods: Likelihoods) -> list[Parts]:
    """Return the parts of each region's raw confidence, in the order of `find_regions`."""
    return [_rate(written, likelihoods) for written in find_written(kind, token_texts)]


def _rate(written: WrittenRegion, likelihoods: Likelihoods) -> Parts:
    rows = written.region.bins
    fixed, share = REACH[written.region.shape]
    reach = [fixed + share * _extent([bin for row in rows for bin in row[axis::2]]) for axis in (0, 1)]
    near, tokens = [], []
    for row, row_tokens in zip(rows, written.rows, strict=True):
        for i, (bin, token) in enumerate(zip(row, row_tokens, strict=False)):  # an x without its y is no point
            near.append(_mass(likelihoods.locations[token], bin, reach[i % 2]))
            tokens.append(token)
    return Parts(_probability(likelihoods.logprobs[list(written.label)].sum()), tuple(near), tuple(tokens))


def _extent(bins: Sequence[int]) -> int:
    return max(bins) - min(bins) if bins else 0


def _mass(probabilities: np.ndarray, bin: int, reach: float) -> float:
    """Return the probability of the bins at most `reach` away from `bin`."""
    first, last = max(0, math.ceil(bin - reach)), min(NUM_BINS - 1, math.floor(bin + reach))
    return _within(float(probabilities[first : last + 1].sum(dtype=np.float64)))


def _probability(logprob: Any) -> float:
    return _within(math.exp(min(0.0, float(logprob))))


def _within(value: float) -> float:
    """Return a value within 0 to 1; 0 for a number that is not finite, of a model that computes such."""
    return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0
