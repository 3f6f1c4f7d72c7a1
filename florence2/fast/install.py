"""Swap the faster counterparts into a model, and out again."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from florence2.fast.bands import BandedChannelBlock, BandedSpatialBlock
from florence2.fast.cuda.convolutions import Conv2d, FastDepthwiseConv
from florence2.fast.cuda.layers import FusedDecoderLayer, FusedEncoderLayer
from florence2.fast.cuda.recorded.graphs import know, recorder_for
from florence2.fast.cuda.recorded.lane import RecordedLane, open_lane, search_recorded, why_plain_options
from florence2.fast.cuda.recorded.slots import planned_bytes
from florence2.fast.cuda.recorded.stages import encode_image_recorded, encode_recorded
from florence2.fast.cuda.weights import lay_out, project
from florence2.fast.decoder import DirectDecoder
from florence2.fast.linear import Linear, linear
from florence2.fast.packed import Packed, in_force, pack
from florence2.fast.unchanged import is_unchanged, remember
from florence2.generation.budget import generation_bytes
from florence2.generation.options import GenerationOptions
from florence2.generation.state import Generation, SpecialIds
from florence2.model.bart import Attention, Decoder, DecoderLayer, EncoderLayer
from florence2.model.cache import DecoderCache
from florence2.model.davit import ChannelBlock, DepthwiseConv, SpatialBlock
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import NO_TRACE, Trace

_PLAIN_LOGITS = Florence2Model.logits


class FastFlorence2Model(Florence2Model):
    """Stands in for `Florence2Model`: its steps may use packed weights, and on CUDA all stages are replayed."""

    def start_cache(
        self,
        memory: Tensor,
        beams: int,
        max_length: int,
        memory_mask: Tensor | None = None,
        trace: Trace = NO_TRACE,
    ) -> DecoderCache:
        """Start one generation; see `Florence2Model.start_cache`."""
        cache = super().start_cache(memory, beams, max_length, memory_mask, trace)
        self.prepare_steps(cache, len(memory) * beams)
        return cache

    def prepare_steps(self, cache: DecoderCache, rows: int) -> None:
        """Let the next steps over `cache`, of about `rows` rows, use packed weights where these are faster.

        Weights are compared with their packed copies now; later changes that torch does not count are not seen.
        """
        # a plain attribute, which copies of the cache drop (see `Packed`)
        cache.packed = None if torch.is_grad_enabled() else pack(self, self.step_weights(), rows)  # type: ignore[attr-defined]

    def step_weights(self) -> list[list[Tensor]]:
        """Return the weights that a step of the decoder reads, those with a common input together."""
        decoder, done, groups = self.language_model.decoder, set[Any](), []
        for layer in decoder.layers:
            own, memory = getattr(layer, "self_attn", None), getattr(layer, "encoder_attn", None)
            if isinstance(memory, Attention):  # used once, for the whole memory
                done |= {getattr(memory, "k_proj", None), getattr(memory, "v_proj", None)}
            if isinstance(own, Attention) and is_unchanged(own, _ATTENTION):  # so that all three see the same input
                joint = [own.q_proj, own.k_proj, own.v_proj]
                done |= set(joint)
                groups.append([part.weight for part in joint])
        groups += [[part.weight] for part in decoder.modules() if type(part) is Linear and part not in done]
        return [*groups, [self.output_weight]]

    def step(self, ids: Tensor, cache: DecoderCache, trace: Trace = NO_TRACE) -> Tensor:
        """Decode the newest id of every beam; see `Florence2Model.step`."""
        packed: Packed | None = getattr(cache, "packed", None)
        with in_force(packed):
            return super().step(ids, cache, trace)

    def logits(self, hidden: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        """Project hidden states (..., D) to float32 logits (..., V)."""
        if Florence2Model.logits is not _PLAIN_LOGITS:  # somebody replaced it for every model
            return super().logits(hidden, trace)
        weight, bias = self.output_weight, self.final_logits_bias[0]
        wide = project(hidden, weight, bias)
        logits = linear(hidden, weight, bias) if wide is None else wide
        return trace("logits", logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FastFlorence2Model":
        """Move or convert every tensor, as `to`, `half` and `cuda` do; then lay out those on a CUDA device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        lay_out(self)
        return self

    def search(
        self, memory: Tensor, options: GenerationOptions, ids: SpecialIds, memory_mask: Tensor | None
    ) -> Generation | None:
        """Generate by replay of CUDA graphs (see `generation.generate.OwnSearch`); None where that is not possible."""
        return search_recorded(self, memory, options, ids, memory_mask)

    def open_lane(self, options: GenerationOptions, ids: SpecialIds) -> RecordedLane[Any] | None:
        """Return a lane that replays CUDA graphs (see `generation.engine.lane.OpensLanes`); None where it cannot."""
        return open_lane(self, options, ids)

    def answer_bytes(self, options: GenerationOptions, memory_length: int) -> int:
        """Estimate the bytes that an answer takes (see `generation.budget.PlansAnswers`)."""
        if recorder_for(self.device) is None or why_plain_options(options) is not None:
            return generation_bytes(self.config, options, memory_length, self.dtype)
        return planned_bytes(self.config, options, memory_length, self.dtype)

    def encode_image(self, pixel_values: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        """Encode an image, on CUDA by replay; see `Florence2Model.encode_image`."""
        encoded = encode_image_recorded(self, pixel_values, super().encode_image) if trace is NO_TRACE else None
        return super().encode_image(pixel_values, trace) if encoded is None else encoded

    def encode(
        self,
        image_features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        trace: Trace = NO_TRACE,
    ) -> Tensor:
        """Encode image tokens and prompt ids together, on CUDA by replay; see `Florence2Model.encode`."""
        plain, memory = super().encode, None
        if trace is NO_TRACE:
            memory = encode_recorded(self, image_features, input_ids, attention_mask, plain)
        return plain(image_features, input_ids, attention_mask, trace) if memory is None else memory


_ATTENTION = remember(frozenset((Attention, Linear)))
remember(frozenset((FastFlorence2Model,)))
_COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    DepthwiseConv: FastDepthwiseConv,
    SpatialBlock: BandedSpatialBlock,
    ChannelBlock: BandedChannelBlock,
    Decoder: DirectDecoder,
    EncoderLayer: FusedEncoderLayer,
    DecoderLayer: FusedDecoderLayer,
    Florence2Model: FastFlorence2Model,
}
know(frozenset(_COUNTERPARTS.values()))


Module = TypeVar("Module", bound=nn.Module)


def install(model: Module) -> Module:
    """Swap the faster counterparts into `model`, a Florence2Model or a part of one, in place, and return it.

    Only the classes of its modules change, so parameters, names, hooks and references stay what they were. Modules of
    other classes, such as subclasses that a user wrote, stay as they are. On a CUDA device some parameters move within
    its memory (`fast.cuda.weights`).
    """
    _swap(model, _COUNTERPARTS)
    lay_out(model)
    return model


def uninstall(model: Module) -> Module:
    """Undo `install`: every module is again of the class that `florence2.model` or torch gave it."""
    _swap(model, {fast: plain for plain, fast in _COUNTERPARTS.items()})
    return model


def plain_class(kind: type) -> type:
    """Return the class that a faster counterpart stands in for, and any other class unchanged."""
    return next((plain for plain, fast in _COUNTERPARTS.items() if fast is kind), kind)


def _swap(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
