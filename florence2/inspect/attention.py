"""Attention maps: where the tokens of an answer attended, on the grid of image tokens and on the image's pixels.

The maps show raw attention weights. They say where a head took its inputs from, not what mattered to the answer;
gradients (`florence2.inspect.saliency`) and patches (`florence2.inspect.patches`) say more about that.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.tracing.names import pooled_spans
from florence2.tracing.runs import Run


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Weights over the memory, split into places of the image, pooled tokens and prompt; together they sum to 1.

    Attributes:
        places: (..., h, w), row by row from the top left.
        pooled: (..., tokens that stand for no single place); as published one, the mean over the grid.
        prompt: (..., P).
        image_size: (width, height) of the image in pixels.
    """

    places: Tensor
    pooled: Tensor
    prompt: Tensor
    image_size: tuple[int, int]

    @property
    def image_share(self) -> Tensor:
        """The share of the weight that lies on places of the image: (...)."""
        return self.places.sum(dim=(-2, -1))

    def to_pixels(self, smooth: bool = True) -> Tensor:
        """Spread `places` over the pixels of the image; each pixel has the weight of its whole cell.

        The model sees the whole image stretched to its own size, so the cells are equal parts of the image.

        Args:
            smooth: Interpolate between the centres of the cells; otherwise each cell has one value.

        Returns:
            (..., height, width).
        """
        return spread_over(self.places, self.image_size, smooth)


def attention_maps(run: Run, alternative: int = 0) -> AttentionMaps:
    """Return the cross-attention of each token of an answer, by layer and head, in the beam that wrote it.

    Args:
        run: A run whose trace kept "decoder.layers.*.cross_attention.weights".
        alternative: As in `run.answer_ids`.

    Returns:
        Maps of (T, layers, heads, ...); those of token n are of the step that computed `run.answer_ids()[n]`.

    Raises:
        OptionError: The weights were not kept, or the run has no such alternative.
    """
    layers = range(run.selection.config.text.decoder_layers)
    names = [f"decoder.layers.{i}.cross_attention.weights" for i in layers]
    weights = [run.along_answer(name, alternative) for name in names]  # each (T, heads, S)
    return split_memory(torch.stack(weights, dim=1), run)


def split_memory(weights: Tensor, run: Run) -> AttentionMaps:
    """Split weights over the memory of a run, (..., S), into places, pooled tokens and prompt.

    Where a checkpoint has several tokens for one place, their weights are added.
    """
    h, w = run.image_grid
    spans = pooled_spans(run.selection.config.vision, (h, w))
    grids = [weights[..., span] for source, span in spans.items() if source != "spatial_avg_pool"]
    pooled = [weights[..., span] for source, span in spans.items() if source == "spatial_avg_pool"]
    return AttentionMaps(
        places=torch.stack(grids).sum(dim=0).view(*weights.shape[:-1], h, w),
        pooled=torch.cat(pooled, dim=-1) if pooled else weights[..., :0],
        prompt=weights[..., run.prompt_span],
        image_size=run.image_size,
    )


def spread_over(cells: Tensor, image_size: tuple[int, int], smooth: bool = True) -> Tensor:
    """Spread values of cells (..., h, w) over pixels (..., height, width); `image_size` is (width, height)."""
    width, height = image_size
    flat = cells.reshape(-1, 1, *cells.shape[-2:]).float()  # (n, 1, h, w)
    pixels = (
        F.interpolate(flat, (height, width), mode="bilinear", align_corners=False)
        if smooth
        else F.interpolate(flat, (height, width), mode="nearest-exact")
    )
    return pixels.view(*cells.shape[:-2], height, width)
