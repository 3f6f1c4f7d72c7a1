"""Estimate the memory of an update before it is made, without computing anything.

The stages of the model run on torch's fake tensors, which have shapes and types but no data, while autograd notes what
the backward pass would need. So the estimate follows the image size, the lengths, frozen parts, LoRA and autocast.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from florence2.model.florence2 import Florence2Model
from florence2.train.gradient_checkpointing import LAYERS

_TEMPORARY = 0.5
"""What the backward pass of a layer takes at its peak besides what was kept, as a share of that. The estimates of whole
runs on a CPU are within 7 % of what was measured, with gradient checkpointing 21 % below (docs/fine-tuning.md)."""


@dataclass(frozen=True)
class BatchShape:
    """The size of a micro-batch: `images`, the `pairs` on all of them, ids of the longest `prompt` and `answer`."""

    images: int
    pairs: int
    prompt: int
    answer: int
    height: int
    width: int


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that the backward pass needs of a layer: all that is kept `inside`, its `input` alone, its `gradients`."""

    path: str
    inside: int
    input: int
    gradients: int


@dataclass(frozen=True)
class UpdateMemory:
    """The bytes of an update of one micro-batch: of each layer in the order of the forward pass, and of the rest.

    `rest` is kept outside the layers, `gradients` belong to parameters outside them.
    """

    layers: tuple[LayerMemory, ...]
    rest: int
    gradients: int

    def peak(self, recomputed: Collection[str] = (), accumulates: bool = False) -> int:
        """Return the most bytes that are needed at once besides parameters and the optimizer's state.

        Args:
            recomputed: The paths of the layers that keep their input alone.
            accumulates: Whether gradients of an earlier micro-batch are there already.
        """
        kept = [layer.input if layer.path in recomputed else layer.inside for layer in self.layers]
        every = self.gradients + sum(layer.gradients for layer in self.layers)
        moments = [self.rest + sum(kept) + self.gradients]  # the backward pass begins
        ready = self.gradients
        for place in reversed(range(len(self.layers))):
            layer = self.layers[place]
            ready += layer.gradients
            inside = layer.inside * (1 + _TEMPORARY)
            moments.append(self.rest + sum(kept[:place]) + round(inside) + (every if accumulates else ready))
        return max(*moments, every)

    def scaled(self, share: float) -> "UpdateMemory":
        """Return the memory of an update of `share` as many images."""
        layers = (
            replace(layer, inside=round(layer.inside * share), input=round(layer.input * share))
            for layer in self.layers
        )
        return UpdateMemory(tuple(layers), round(self.rest * share), self.gradients)

    def worth_recomputing(self, accumulates: bool = False) -> list[str]:
        """Return the layers whose recomputation lowers the peak; the last ones may keep what they have.

        The peak is in the backward pass of the first layers: they have the finest grids, and by then the gradients of
        all others are there. What the last layers kept is gone by then.
        """
        recomputed = [layer.path for layer in self.layers if layer.inside > layer.input]
        least = self.peak(recomputed, accumulates)
        for layer in reversed(self.layers):
            fewer = [path for path in recomputed if path != layer.path]
            if self.peak(fewer, accumulates) <= least:
                recomputed = fewer
        return recomputed


def estimate_update(model: Florence2Model, shape: BatchShape, bfloat16: bool = False) -> UpdateMemory | None:
    """Estimate the memory of an update; None for a model that cannot run without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

    stages = _Stages(model)
    try:
        with (
            FakeTensorMode(),
            _recording(model) as recorder,
            torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16),
        ):
            fakes = {name: _without_data(value) for name, value in _tensors(stages)}
            recorder.own |= {_storage(value) for value in fakes.values()}
            torch.func.functional_call(stages, fakes, (shape,))
    except Exception:  # noqa: BLE001  a model that a user changed may do anything
        return None
    layers = [(path, model.get_submodule(path)) for path in recorder.inside]
    gradients = {path: _gradient_bytes(layer) for path, layer in layers}
    return UpdateMemory(
        tuple(LayerMemory(path, recorder.inside[path], recorder.inputs[path], gradients[path]) for path, _ in layers),
        sum(recorder.kept.values()) - sum(recorder.inside.values()),
        _gradient_bytes(model) - sum(gradients.values()),
    )


def _gradient_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def _without_data(value: Tensor) -> Tensor:
    """Return a tensor like `value`; within FakeTensorMode it has no data."""
    return torch.empty(value.shape, dtype=value.dtype, device=value.device, requires_grad=value.requires_grad)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


class _Stages(nn.Module):
    """The stages of teacher forcing up to the last hidden state, on a batch of zeros."""

    def __init__(self, model: Florence2Model):
        super().__init__()
        self.model = model

    def forward(self, shape: BatchShape) -> Tensor:
        model, device = self.model, self.model.device

        def ids(length: int) -> Tensor:
            return torch.zeros(shape.pairs, length, dtype=torch.long, device=device)

        pixels = torch.zeros(shape.images, 3, shape.height, shape.width, device=device)
        owner = torch.arange(shape.pairs, device=device) % shape.images
        memory = model.encode(model.encode_image(pixels)[owner], ids(shape.prompt), ids(shape.prompt) == 0)
        language = model.language_model
        hidden: Tensor = language.decoder(language.embed_answer(ids(shape.answer)), memory)
        return hidden


class _Recorder:
    """Notes the storages that autograd keeps, and how many bytes of them each layer adds."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}
        self.own: set[int] = set()
        self.inside: dict[str, int] = {}
        self.inputs: dict[str, int] = {}
        self._alive: list[Any] = []

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is kept."""
        key = _storage(tensor)
        if key not in self.own and key not in self.kept:
            storage = tensor.untyped_storage()
            self._alive.append(storage)  # so that no other storage gets its address
            self.kept[key] = storage.nbytes()
        return tensor

    def before(self, path: str, given: Sequence[Any]) -> None:
        """Note how much was kept before a layer, and the size of its input."""
        self.inside[path] = -sum(self.kept.values())
        self.inputs[path] = given[0].nbytes

    def after(self, path: str) -> None:
        """Note how much the layer added."""
        self.inside[path] += sum(self.kept.values())


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


@contextmanager
def _recording(model: Florence2Model) -> Iterator[_Recorder]:
    """Within the block, record what autograd keeps."""
    recorder, handles = _Recorder(), list[RemovableHandle]()
    for path, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            handles.append(layer.register_forward_pre_hook(lambda _, given, path=path: recorder.before(path, given)))
            handles.append(layer.register_forward_hook(lambda *_, path=path: recorder.after(path)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor):
            yield recorder
    finally:
        for handle in handles:
            handle.remove()
