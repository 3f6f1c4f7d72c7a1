"""Models without values, and how they get them."""

import torch
from torch import nn

from florence2.checkpoints.checks.empty import fill


def test_a_tensor_of_two_names_stays_one() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
        model["b"].weight = model["a"].weight
    weights = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3), "b.bias": torch.randn(3)}
    fill(model, weights, torch.device("cpu"), torch.float32)
    assert model["b"].weight is model["a"].weight and torch.equal(model["b"].weight, weights["a.weight"])
    assert torch.equal(model["b"].bias, weights["b.bias"])
