"""What the HTTP side must know of a model that may be loaded in another process."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from florence2 import __version__
from florence2.asking.processor import AnswerProcessor
from florence2.generation.options import GenerationOptions
from florence2.pipeline import Florence2


@dataclass(frozen=True)
class Knowledge:
    """A model without its weights.

    Attributes:
        processor: Its tokenizer, tasks and calibration.
        own_options: Its generation settings.
        slots: How many answers are computed at once.
    """

    processor: AnswerProcessor
    own_options: GenerationOptions
    slots: int

    def options(self, **settings: Any) -> GenerationOptions:
        """Return the model's generation settings, with some changed. Raises OptionError for wrong ones."""
        return self.own_options.changed(**settings)


def describe_weights(model: Florence2) -> dict[str, Any]:
    """Return versions, and the hash of the weights in memory, which are read once for it."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {"version": __version__, "torch": torch.__version__, "weights_sha256": hashed.hexdigest()}
