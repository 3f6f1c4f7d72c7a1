"""A model and one call of it, for libraries that know nothing but modules."""

import copy

import pytest
import torch
from torch import Tensor

from florence2 import Florence2
from florence2.model.trace import start_trace
from florence2.tracing.patches import PatchLike

Call = tuple[Tensor, Tensor, Tensor]
"""pixel_values, input_ids, decoder_input_ids"""


@pytest.fixture
def f(mini: Florence2) -> Florence2:
    """A copy, because these libraries leave wrappers in the modules."""
    return Florence2(copy.deepcopy(mini.model), mini.processor)


@pytest.fixture
def call(f: Florence2) -> Call:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    return pixels, torch.tensor([f.processor.prompt("<OD>")]), torch.tensor([[2, 0, 900, 700]])


def logits_patched(f: Florence2, call: Call, patches: dict[str, PatchLike]) -> Tensor:
    """The logits with values changed by this package's own patches."""
    with f.patched(patches), torch.no_grad():
        logits: Tensor = f.model(*call, trace=start_trace(f))
        return logits


def value_of(f: Florence2, call: Call, name: str) -> Tensor:
    """A value of the call by this package's own trace."""
    from florence2.inspect import Tracing

    recording = Tracing(f.model.config, [f"={name}"]).start()
    with torch.no_grad():
        f.model(*call, trace=recording)
    return recording.values[name][0]
