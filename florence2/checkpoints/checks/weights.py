"""Whether a model still has the weights that it was loaded with."""

import math
from collections.abc import Mapping
from itertools import chain
from typing import TypeAlias

import torch
from torch import nn

Sums: TypeAlias = dict[str, tuple[float, float]]
"""The sum and the norm of each parameter and buffer by its name, which show any change of training or editing."""
_ROUNDING = 1e-9  # between two orders of summing up in float64


def sum_weights(model: nn.Module) -> Sums:
    """Return the sums of a model's weights."""
    sums = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        values = tensor.detach().cpu()  # not every device computes in float64
        norm = torch.linalg.vector_norm(values.flatten(), dtype=torch.float64)
        sums[name] = values.sum(dtype=torch.float64).item(), norm.item()
    return sums


def are_same_weights(old: Mapping[str, tuple[float, float]], new: Mapping[str, tuple[float, float]]) -> bool:
    """Return whether two sums are of the same weights under the same names."""
    return old.keys() == new.keys() and all(
        math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=_ROUNDING * old[name][1])
        for name in old
        for a, b in zip(old[name], new[name], strict=True)
    )
