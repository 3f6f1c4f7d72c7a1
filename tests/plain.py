"""The formulas of the layers, from their weights, in plain torch: nothing is shared with florence2."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def randomised(module: M) -> M:
    """`module` in float64 and outside training, with random weights everywhere: norms are not the identity."""
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def equal(found: Tensor, expected: Tensor) -> bool:
    """Up to float64's rounding. torch.allclose alone allows a relative 1e-5, more than an epsilon changes."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0.0, atol=1e-11)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T + layer.bias


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def mlp(x: Tensor, layer: Any) -> Tensor:
    hidden = linear(x, layer.fc1)
    return linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, layer.fc2)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, looks: Tensor | None = None) -> Tensor:
    """Head by head: (B, T, D), (B, S, D), (B, S, D) -> (B, T, D); `looks` is True where a query may look."""
    parts = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if looks is not None:
            scores = scores.masked_fill(~looks, -torch.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, dim=-1)
