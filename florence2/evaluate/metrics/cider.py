"""CIDEr-D: how close a caption is to several references, by the n-grams that few other images have."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

Words: TypeAlias = Sequence[str]
Ngram: TypeAlias = tuple[str, ...]

LONGEST = 4
"""N-grams of 1 to this many words count."""
_SIGMA = 6.0  # of the penalty for captions that are longer or shorter than a reference
_SCALE = 10.0


def cider_d(
    captions: Sequence[Words],
    references: Sequence[Sequence[Words]],
    corpus: Sequence[Sequence[Words]] | None = None,
) -> list[float]:
    """Return the CIDEr-D score of each caption.

    The frequencies of n-grams are those in the references of all images, so a score depends on the other images.

    Args:
        captions: The words of each image's caption (see `split_captions`).
        references: The words of each image's references, at least one for each image.
        corpus: The references of all images, where captions of only some are measured; None takes `references`.

    Returns:
        One score of 0 to 10 for each image. Their mean, times 100, is the number that papers publish as CIDEr.
    """
    if len(captions) != len(references) or not all(references):
        raise ValueError(f"{len(captions)} captions need references each, but {len(references)} images have some.")
    counted = [[_count(reference) for reference in each] for each in references]
    every = counted if corpus is None else [[_count(reference) for reference in each] for each in corpus]
    frequencies = Counter(ngram for each in every for ngram in set().union(*each))
    weigh = _Weights(frequencies, len(every))
    return [
        sum(_similarity(weigh(_count(caption)), weigh(reference)) for reference in each) / len(each)
        for caption, each in zip(captions, counted, strict=True)
    ]


class _Weighted(NamedTuple):
    """The weights of a sentence's n-grams, their norm for each n, and the number of its bigrams."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    length: int


class _Weights:
    """Weights of n-grams: how often a sentence has them, times the logarithm of how rare they are."""

    def __init__(self, frequencies: Mapping[Ngram, int], images: int):
        self._log_images = math.log(images)
        self._logs = {ngram: math.log(count) for ngram, count in frequencies.items()}

    def __call__(self, counts: Counter[Ngram]) -> _Weighted:
        weights: list[dict[Ngram, float]] = [{} for _ in range(LONGEST)]
        for ngram, count in counts.items():
            # an n-gram that no reference has counts as that of one image
            weights[len(ngram) - 1][ngram] = count * (self._log_images - self._logs.get(ngram, 0.0))
        norms = [math.sqrt(sum(weight**2 for weight in each.values())) for each in weights]
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)  # the official code counts bigrams
        return _Weighted(weights, norms, length)


def _count(words: Words) -> Counter[Ngram]:
    # a token may hold a space that does not break ("3 1/2"); the official code splits there too
    split = " ".join(words).split()
    return Counter(
        tuple(split[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(split) - n + 1)
    )


def _similarity(caption: _Weighted, reference: _Weighted) -> float:
    """Return the mean over n of the cosine of two sentences; no n-gram counts more often than in the reference."""
    total = 0.0
    for mine, other, norm, other_norm in zip(
        caption.weights, reference.weights, caption.norms, reference.norms, strict=True
    ):
        shared = sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in mine.items() if ngram in other)
        total += shared / (norm * other_norm) if norm and other_norm else shared
    difference = caption.length - reference.length
    return _SCALE * math.exp(-(difference**2) / (2 * _SIGMA**2)) * total / LONGEST
