"""What the search needs of NumPy: log-probabilities, and the largest values of long rows."""

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"
NEVER = float("-inf")
_BLOCK = 256


def log_softmax(logits: Array) -> Array:
    """Return the log-probabilities of logits (..., V) in float32."""
    shifted: Array = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def largest(values: Array, count: int) -> Array:
    """Return the indices of the `count` largest of values (N,), best first; of equal ones the lower index comes first.

    The values that are compared one by one are those above the count-th largest maximum of a block, which are few.
    """
    whole = len(values) // _BLOCK * _BLOCK
    maxima = np.concatenate([values[:whole].reshape(-1, _BLOCK).max(axis=1), values[whole:]])
    near = np.arange(len(values))
    if len(maxima) > count:
        near = np.flatnonzero(values >= np.partition(maxima, -count)[-count])
    return near[np.argsort(-values[near], kind="stable")[:count]]
