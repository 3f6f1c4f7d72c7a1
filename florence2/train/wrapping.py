"""Put something around the forward pass of modules for the length of a block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def wrapped_forward(modules: Sequence[nn.Module], wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Within the block, the forward method of each module is what `wrap` makes of it. Names of weights stay."""
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = wrap(module.forward)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward  # uncovers the method of the class
            if own is not None:
                module.forward = own
