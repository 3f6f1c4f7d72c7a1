"""Gradient checkpointing: a layer's inside is computed a second time in the backward pass instead of being kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from florence2.model.bart import DecoderLayer, EncoderLayer
from florence2.model.davit import DualBlock
from florence2.model.florence2 import Florence2Model

LAYERS = (DualBlock, EncoderLayer, DecoderLayer)


@contextmanager
def rematerialised(model: Florence2Model, active: bool = True) -> Iterator[None]:
    """Within the block, every pair of DaViT blocks and every layer of the language model keeps only its input.

    The gradients are the same; memory falls by the number of layers, at the price of one more forward pass.
    """
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, LAYERS)] if active else []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
