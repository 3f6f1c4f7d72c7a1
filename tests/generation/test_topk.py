"""The largest values by blocks, against torch's."""

import math

import pytest
import torch

from florence2.generation.topk import topk


@pytest.mark.parametrize("size", [5, 256, 257, 2000, 51289 * 3])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_the_best_of_all_by_blocks(size: int, k: int) -> None:
    values = torch.randn(2, max(size, k), generator=torch.Generator().manual_seed(size + k))
    values[0, ::3] = -math.inf
    if k < size // 2:
        values[1, -1], values[1, 1] = 9.0, 8.0
    with torch.device("meta"):  # the default, which has no values, is not where tensors are made
        best, places = topk(values, k)
    assert torch.equal(best, values.topk(k).values) and torch.equal(values.gather(1, places), best)
    assert all(len(set(row)) == k for row in places.tolist())
