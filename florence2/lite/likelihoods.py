"""A second reading of a finished answer by teacher forcing; see `florence2.generation.engine.forced`."""

from collections.abc import Sequence

import numpy as np

from florence2.answers.confidence import Likelihoods
from florence2.lite.cache import GraphDecoder
from florence2.lite.search.arrays import Array


def read_again(decoder: GraphDecoder, question: int, ids: Array, locations: Sequence[int]) -> Likelihoods:
    """Return the model's own probabilities along an answer `ids` (1 + T,), in one pass over its question's memory.

    `locations` are the ids of the location tokens.
    """
    places, written = np.array(locations), iter(ids[1:])
    logprobs, probabilities = [], []
    for logits in decoder.read(question, ids[:-1]):  # some of the T positions (T', V)
        top = logits.max(axis=1, keepdims=True)
        total = np.log(np.exp(logits - top).sum(axis=1, keepdims=True)) + top  # (T', 1)
        own = [next(written) for _ in range(len(logits))]
        logprobs.append((logits[np.arange(len(logits)), own][:, None] - total)[:, 0])
        probabilities.append(np.exp(logits[:, places] - total))
    return Likelihoods(np.concatenate(logprobs), np.concatenate(probabilities))
