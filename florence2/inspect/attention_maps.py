"""Where the tokens of an answer looked: cross-attention on the grid of image tokens, and on the picture's pixels.

The weights are shown as they are. They say from where a head took what it mixed, not what mattered to the answer:
gradients (`saliency.py`) and patches (`patching.py`) say more about that.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.tracing.names import pooled_spans
from florence2.tracing.runs import Run


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """How weights are spread over the memory: on places of the picture, on its pooled tokens, on the prompt.

    `places` (..., h, w), row by row from the top left; `pooled` (..., tokens that stand for no place), as published
    the mean over the grid; `prompt` (..., P). The three sum to 1. `image_size` is (width, height) in pixels.
    """

    places: Tensor
    pooled: Tensor
    prompt: Tensor
    image_size: tuple[int, int]

    @property
    def image_share(self) -> Tensor:
        """How much of the weight lies on places: (...)."""
        return self.places.sum(dim=(-2, -1))

    def to_pixels(self, smooth: bool = True) -> Tensor:
        """`places` on the picture itself: (..., height, width), each pixel with the weight of its whole cell.

        The model sees the whole picture stretched to its own size, so the cells are equal parts of it. `smooth`
        blends between the middles of cells, otherwise each is one flat patch.
        """
        return spread_over(self.places, self.image_size, smooth)


def map_attention(run: Run, alternative: int = 0) -> AttentionMaps:
    """The cross-attention of each token of the answer, by layer and head, in the beam that wrote it.

    The maps are (T, layers, heads, ...) long: those of token n are of the step that computed `run.answer_ids()[n]`.
    The trace must have kept "decoder.layers.*.cross_attention.weights"; `alternative` as in `run.answer_ids`.
    """
    layers = range(run.tracing.config.text.decoder_layers)
    names = [f"decoder.layers.{i}.cross_attention.weights" for i in layers]
    weights = [run.along_answer(name, alternative) for name in names]  # each (T, heads, S)
    return split_memory(torch.stack(weights, dim=1), run)


def split_memory(weights: Tensor, run: Run) -> AttentionMaps:
    """Weights over the memory of a run (..., S) -> over places, pooled tokens and prompt.

    Where a checkpoint pools so that several tokens stand for one place, their weights are added.
    """
    h, w = run.image_grid
    spans = pooled_spans(run.tracing.config.vision, (h, w))
    grids = [weights[..., span] for source, span in spans.items() if source != "spatial_avg_pool"]
    pooled = [weights[..., span] for source, span in spans.items() if source == "spatial_avg_pool"]
    return AttentionMaps(
        places=torch.stack(grids).sum(dim=0).view(*weights.shape[:-1], h, w),
        pooled=torch.cat(pooled, dim=-1) if pooled else weights[..., :0],
        prompt=weights[..., run.prompt_span],
        image_size=run.image_size,
    )


def spread_over(cells: Tensor, image_size: tuple[int, int], smooth: bool = True) -> Tensor:
    """Values of cells (..., h, w) -> of pixels (..., height, width); `image_size` is (width, height)."""
    width, height = image_size
    flat = cells.reshape(-1, 1, *cells.shape[-2:]).float()
    found = (
        F.interpolate(flat, (height, width), mode="bilinear", align_corners=False)
        if smooth
        else F.interpolate(flat, (height, width), mode="nearest-exact")
    )
    return found.view(*cells.shape[:-2], height, width)
