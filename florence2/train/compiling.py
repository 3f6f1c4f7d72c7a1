"""`torch.compile` for training: the layers that a model repeats, each compiled once."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from florence2.errors import OptionError, clip
from florence2.model.bart import DecoderLayer, EncoderLayer
from florence2.model.florence2 import Florence2Model
from florence2.train.wrapping import Forward, wrapped_forward

_VARIANTS = 64
"""How often one kind of layer may be compiled: with and without a mask, frozen or not, for one row and for several."""


@contextmanager
def compiled_layers(model: Florence2Model, active: bool = True) -> Iterator[None]:
    """Within the block, every layer of the text encoder and decoder is compiled for training.

    Layers of one kind share what was compiled, so it takes seconds where compiling a whole model takes minutes. Losses
    stay the same up to rounding; dropout draws other numbers. Without gradients, as in an evaluation, layers compute
    as always. Blocks of DaViT became slower on a CPU, and stay as they are. Nothing changes unless `active`.

    Raises:
        OptionError: torch cannot compile here.
    """
    if not active:
        yield
        return
    check_compiler(model.device)
    layers = [module for module in model.modules() if isinstance(module, EncoderLayer | DecoderLayer)]
    with torch._dynamo.config.patch(recompile_limit=_VARIANTS), wrapped_forward(layers, _compile):
        yield


def _compile(forward: Forward) -> Forward:
    compiled = torch.compile(forward, dynamic=True)  # prompts and answers have many lengths

    def choose(*given: Any, **named: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*given, **named)

    return choose


def check_compiler(device: torch.device) -> None:
    """Raise OptionError where torch cannot compile, as on a CPU without a C++ compiler."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(_add_one)(torch.ones(2, device=device))
    except Exception as error:  # noqa: BLE001  whatever a missing compiler raises
        need = "a C++ compiler such as g++" if device.type == "cpu" else "a C compiler and Triton"
        reason = clip(str(error).strip().partition("\n")[0])
        raise OptionError(
            f"torch cannot compile here ({reason}). --compile needs {need}: install it, or leave --compile out."
        ) from None


def _add_one(value: torch.Tensor) -> torch.Tensor:
    return value + 1
