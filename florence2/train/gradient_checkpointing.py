"""Gradient checkpointing: recompute the inside of a layer in the backward pass instead of keeping it."""

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
def gradient_checkpointing(model: Florence2Model, active: bool = True) -> Iterator[None]:
    """Within the block, keep only the input of every pair of DaViT blocks and every layer of the language model.

    The gradients stay the same. Memory for activations falls by about the number of layers, for one more forward pass.
    Nothing changes unless `active`.
    """
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, LAYERS)] if active else []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # uncovers the method of the class
