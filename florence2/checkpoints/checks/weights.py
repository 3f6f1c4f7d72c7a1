"""Whether a calibration is of the weights that a model has."""

import math
from dataclasses import replace

import torch
from torch import nn

from florence2.answers.confidence import Calibration

_ROUNDING = 1e-9  # between two orders of summing up in float64


def weigh(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[float, float]:
    """Return the sum and the norm of all weights, as stored in `dtype`: any training or editing changes them."""
    total, squares = 0.0, 0.0
    for tensor in model.state_dict().values():
        values = tensor.to("cpu", dtype)  # not every device computes in float64
        total += values.sum(dtype=torch.float64).item()
        squares += torch.linalg.vector_norm(values.flatten(), dtype=torch.float64).item() ** 2
    return total, math.sqrt(squares)


def is_calibrated(calibration: Calibration, model: nn.Module) -> bool:
    """Return whether the calibration is of this model's weights, or does not name its weights."""
    if calibration.weights is None:
        return True
    slack = _ROUNDING * calibration.weights[1]
    pairs = zip(weigh(model), calibration.weights, strict=True)
    return all(math.isclose(now, then, rel_tol=_ROUNDING, abs_tol=slack) for now, then in pairs)


def of_weights(calibration: Calibration, model: nn.Module, dtype: torch.dtype | None = None) -> Calibration:
    """Return the calibration as that of the weights of `model`, as stored in `dtype`."""
    return replace(calibration, weights=weigh(model, dtype))
