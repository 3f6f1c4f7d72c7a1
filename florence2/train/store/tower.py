"""A vision tower that does not train: its identity, and its output for images."""

import hashlib
import math

import PIL
import torch
from torch import Tensor

from florence2 import __version__
from florence2.fast.install import plain_class
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor

_FORMAT = 1
_AT_ONCE = 8  # images on an accelerator; more gain little


class FrozenTower:
    """The vision tower of a model, which does not train, in evaluation mode and without gradients.

    Attributes:
        dtype: The type of its output: bfloat16 under autocast, otherwise the model's.
        at_once: How many images it computes together. A CPU gains nothing from a batch.
        digest: 32 hexadecimal digits, different for everything that gives other outputs: weights, structure, settings
            of the images, precision, and the versions of the libraries that compute.
    """

    def __init__(
        self,
        model: Florence2Model,
        processor: Processor,
        precision: str = "float32",
        at_once: int | None = None,
    ):
        """Describe the tower of `model` under autocast to bfloat16, or without autocast for "float32"."""
        self._model, self._autocast = model, precision == "bfloat16"
        self.dtype = torch.bfloat16 if self._autocast else model.dtype
        self.at_once = at_once or (1 if model.device.type == "cpu" else _AT_ONCE)
        size = processor.image_config
        self.shape = (*model.config.vision.grid_size(size.height, size.width), model.config.vision.dim_embed[-1])
        self.digest = self._digest(processor)

    @property
    def grid_bytes(self) -> int:
        """Return the bytes of one output on disk, as the configuration describes it."""
        return math.prod(self.shape) * self.dtype.itemsize

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return the outputs (B, h, w, C), on the CPU, of at most `at_once` images (B, 3, H, W).

        An image gives the same bits whichever images come with it, so that it does not matter where a run was
        interrupted: a batch is filled up to `at_once`, because kernels are chosen by its size.
        """
        tower, device, count = self._model.vision_tower.eval(), self._model.device, len(pixel_values)
        filled = torch.cat([pixel_values, pixel_values[-1:].expand(self.at_once - count, -1, -1, -1)])
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            grids: Tensor = tower(filled.to(device, self._model.dtype))
        return grids[:count].to(self.dtype).cpu()

    def _digest(self, processor: Processor) -> str:
        tower = self._model.vision_tower
        versions = (_FORMAT, __version__, torch.__version__, PIL.__version__)
        settings = (self._model.config.vision, processor.image_config, processor.background, self.dtype, self._autocast)
        classes = [(name, plain_class(type(module)).__qualname__) for name, module in tower.named_modules()]
        hashed = hashlib.sha256(repr((versions, settings, classes)).encode())
        for name, tensor in (*tower.named_parameters(), *tower.named_buffers()):
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return hashed.hexdigest()[:32]


def is_frozen(model: Florence2Model) -> bool:
    """Return whether no parameter of the vision tower trains."""
    return not any(parameter.requires_grad for parameter in model.vision_tower.parameters())
