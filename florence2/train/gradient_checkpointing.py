"""Gradient checkpointing: recompute the inside of a layer in the backward pass instead of keeping it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from florence2.model.bart import DecoderLayer, EncoderLayer
from florence2.model.davit import ChannelBlock, SpatialBlock
from florence2.model.florence2 import Florence2Model
from florence2.train.wrapping import wrapped_forward

LAYERS = (SpatialBlock, ChannelBlock, EncoderLayer, DecoderLayer)


@contextmanager
def gradient_checkpointing(
    model: Florence2Model, active: bool = True, paths: Collection[str] | None = None
) -> Iterator[None]:
    """Within the block, keep only the input of every block of DaViT and every layer of the language model.

    The gradients stay the same. Memory for activations falls by about the number of layers, for one more forward pass.
    `paths` chooses among these modules (see `memory.UpdateMemory.worth_recomputing`); None is all. Nothing changes
    unless `active`.
    """
    layers: list[nn.Module] = [
        module
        for path, module in model.named_modules()
        if active and isinstance(module, LAYERS) and (paths is None or path in paths)
    ]
    with wrapped_forward(layers, lambda forward: partial(checkpoint, forward, use_reentrant=False)):
        yield
