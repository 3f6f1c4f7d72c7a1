"""Say which way each part of a model goes, plain or faster, and why; the ways themselves ask the same questions."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from florence2.fast import bands, decoder, linear, packed
from florence2.fast.cuda import convolutions, layers, weights
from florence2.fast.cuda.kernels.availability import why_no_kernel, why_not_cuda
from florence2.fast.cuda.recorded.graphs import DECODER, ENCODER, VISION, why_given_up, why_not_recorded
from florence2.fast.install import FastFlorence2Model
from florence2.generation.options import GenerationOptions
from florence2.model.absent import find_absent
from florence2.model.bart import Attention, DecoderLayer, EncoderLayer
from florence2.model.davit import ChannelBlock, SpatialBlock
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import NO_TRACE, Trace, start_trace

_SHOWN = 3  # reasons a line; a change in every layer should not fill the screen
_NOT_INSTALLED = "florence2.fast.install.install(model) was not called"


class HasModel(Protocol):
    """Anything with a model, such as a `Florence2`."""

    model: Florence2Model


def explain_path(f: HasModel, num_beams: int | None = None) -> str:
    """Say which way each part of the model goes in the next run, and why.

    The faster ways step aside wherever a part was changed; this names the part. They cannot see a replaced function of
    a module (`torch.nn.functional.linear = ...`), so this cannot either: load with `attention="eager"` for that. Traces
    and patches in force in the current thread count.

    Args:
        f: The `Florence2`.
        num_beams: The rows of a step, for one image; None takes the checkpoint's own setting.

    Returns:
        A line each for the blocks of the vision tower, its convolutions, the layers of encoder and decoder, linear
        maps, the decoder's layers and steps, the weights laid out for a CUDA device, and CUDA graphs.
    """
    model, trace = f.model, start_trace(f)
    beams = num_beams or GenerationOptions.from_settings(model.config.generation).num_beams
    with torch.inference_mode():
        lines = {
            "vision tower": _explain_blocks(model, trace),
            "convolutions": _explain_convolutions(model),
            "text layers": _explain_layers(model, trace),
            "linear maps": _explain_maps(model),
            "decoder's layers": _explain_decoder(model, trace),
            "decoder's steps": _explain_steps(model, beams),
            "weights laid out": _explain_weights(model),
            "CUDA graphs": _explain_graphs(model, trace),
        }
    return "\n".join(f"{part}: {text}" for part, text in lines.items())


def _explain_blocks(model: Florence2Model, trace: Trace) -> str:
    tower = model.vision_tower
    blocks = {
        f"vision_tower.{path}": block
        for path, block in tower.named_modules()
        if isinstance(block, SpatialBlock | ChannelBlock)
    }
    if not blocks:
        return f"plain: vision_tower is of the class {type(tower).__name__}, which has no blocks of this package"
    way = "kernels" if why_no_kernel(model.device, model.dtype) is None else "bands"
    return _count_plain(f"blocks by {way}", [_why_block_is_plain(model, *item, trace) for item in blocks.items()])


def _count_plain(ways: str, reasons: Sequence[str | None]) -> str:
    """Say how many parts go a faster way, "blocks by bands", by why each does not; None where it does."""
    plain = [reason for reason in reasons if reason is not None]
    if not plain:
        return f"all {len(reasons)} {ways}"
    faster = f"{len(reasons) - len(plain)} of {len(reasons)} {ways}; " if len(plain) < len(reasons) else ""
    return f"{faster}plain: {_join(plain)}"


def _why_block_is_plain(
    model: Florence2Model, path: str, block: SpatialBlock | ChannelBlock, trace: Trace
) -> str | None:
    if isinstance(block, bands.BandedSpatialBlock | bands.BandedChannelBlock):
        return bands.why_plain(block, model.device, trace.at(path), path)
    if block.attention != "sdpa":
        return "eager attention was asked for"
    if type(block) in (SpatialBlock, ChannelBlock):
        return _NOT_INSTALLED
    return f"{path} is of the class {type(block).__name__}, which the faster way does not know"


def _why_model_is_plain(model: Florence2Model) -> str | None:
    """Return why no faster way at all was swapped into the model; None if it was."""
    if isinstance(model, FastFlorence2Model):
        return None
    if any(vars(part).get("attention") == "eager" for part in model.modules()):
        return "eager attention was asked for"
    if type(model) is Florence2Model:
        return _NOT_INSTALLED
    return f"the model is of the class {type(model).__name__}, which the faster way does not know"


def _explain_convolutions(model: Florence2Model) -> str:
    parts = [part for part in model.modules() if isinstance(part, convolutions.Conv2d)]
    if not parts:
        return f"plain: {_why_model_is_plain(model) or _NOT_INSTALLED}"
    reasons = [convolutions.why_plain(part, model.device, model.dtype) for part in parts]
    plain = [reason for reason in reasons if reason is not None]
    exact = [f"{len(parts) - len(plain)} in float32 without TF32"] if len(plain) < len(parts) else []
    return "; ".join(exact + ([f"plain: {_join(plain)}"] if plain else []))


def _explain_layers(model: Florence2Model, trace: Trace) -> str:
    if find_absent(model) is not None:
        return "none: the language model is missing"
    text = model.language_model
    found = {path: part for path, part in text.named_modules() if isinstance(part, EncoderLayer | DecoderLayer)}
    if not found:
        return "plain: encoder and decoder have no layers of this package"
    return _count_plain("by kernels", [_why_layer_is_plain(model, *item, trace) for item in found.items()])


def _why_layer_is_plain(
    model: Florence2Model, path: str, layer: EncoderLayer | DecoderLayer, trace: Trace
) -> str | None:
    if isinstance(layer, layers.FusedEncoderLayer | layers.FusedDecoderLayer):
        return layers.why_plain(layer, model.device, trace.at(path), f"language_model.{path}")
    if type(layer) in (EncoderLayer, DecoderLayer):
        return _why_model_is_plain(model) or _NOT_INSTALLED
    return f"language_model.{path} is of the class {type(layer).__name__}, which the faster way does not know"


def _explain_weights(model: Florence2Model) -> str:
    if find_absent(model) is not None:
        return "none: the language model is missing"
    reason = _why_model_is_plain(model) or why_not_cuda(model.device) or weights.why_not_padded(model)
    if reason is not None:
        return f"none: {reason}"
    attentions = [part for part in model.language_model.modules() if isinstance(part, Attention)]
    joint = sum(weights.joint_map(part) is not None for part in attentions)
    return f"output projection; queries, keys and values of {joint} of {len(attentions)} attentions"


def _explain_maps(model: Florence2Model) -> str:
    maps = {path: part for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    others = [
        f"{path} is {'a plain nn.Linear' if type(part) is nn.Linear else f'of the class {type(part).__name__}'}"
        for path, part in maps.items()
        if type(part) is not linear.Linear
    ]
    measured = sum(type(part) is linear.Linear for part in maps.values())
    if not measured:
        reason: str | None = _why_model_is_plain(model) or _NOT_INSTALLED
    elif linear.is_replaced():
        reason = "nn.Linear.forward was replaced"
    else:
        reason = linear.why_plain(model.device, model.dtype)
    if reason is not None:
        return f"plain: {reason}"
    chosen = [f"{routine} for {count}" for routine, count in linear.chosen_so_far().items() if count]
    text = f"measured routine for {measured}; chosen so far, by shape: {', '.join(chosen) or 'none yet'}"
    return f"{text}; as they are: {_join(others)}" if others else text


def _explain_decoder(model: Florence2Model, trace: Trace) -> str:
    absent = find_absent(model)
    if absent is not None:
        return f"none. {absent.error()}"
    stack = model.language_model.decoder
    reason = _why_model_is_plain(model)
    if reason is None and trace is not NO_TRACE:
        reason = "a trace or patch is in force"
    if reason is None and type(stack) is not decoder.DirectDecoder:
        reason = f"language_model.decoder is of the class {type(stack).__name__}, which the faster way does not know"
    reason = reason or decoder.why_not_direct(model.device, model.dtype)
    reason = reason or decoder.why_called(stack.layers, "language_model.decoder.layers")
    return f"plain: {reason}" if reason else f"all {len(stack.layers)} computed without calling their modules"


def _explain_steps(model: Florence2Model, rows: int) -> str:
    absent = find_absent(model)
    if absent is not None:
        return f"none. {absent.error()}"
    reason = _why_model_is_plain(model) or packed.why_none(rows)
    if reason is not None:
        return f"plain: {reason}"
    assert isinstance(model, FastFlorence2Model)
    groups = model.step_weights()
    reasons = [reason for group in groups for _ in group if (reason := packed.why_unusable(group)) is not None]
    usable = [group for group in groups if packed.why_unusable(group) is None]
    if not packed.gains(usable, rows):
        return f"plain: {_join([*reasons, *['packing gains too little here'] * _count(usable)])}"
    text = f"{_count(usable)} of {_count(groups)} weights packed for {rows} row{'s' if rows > 1 else ''}"
    return f"{text}; plain: {_join(reasons)}" if reasons else text


def _count(groups: Sequence[Sequence[Tensor]]) -> int:
    return sum(map(len, groups))


def _explain_graphs(model: Florence2Model, trace: Trace) -> str:
    if find_absent(model) is not None:
        return "none: the decoder is missing"
    reason = _why_model_is_plain(model)
    if reason is None and trace is not NO_TRACE:
        reason = "a trace or patch is in force"
    if reason is None and model.device.type != "cuda":
        reason = f"the model is on {model.device.type}"
    reason = reason or why_given_up()
    if reason is not None:
        return f"none: {reason}"
    parts = {"images": VISION, "prompts": ENCODER, "steps": DECODER}
    reasons = {name: why_not_recorded(model, part) for name, part in parts.items()}
    replayed = ", ".join(name for name, reason in reasons.items() if reason is None)
    plain = [f"{name} plain: {reason}" for name, reason in reasons.items() if reason is not None]
    return "; ".join([f"{replayed} replayed", *plain] if replayed else plain)


def _join(reasons: Iterable[str]) -> str:
    """Join reasons, each with how often it holds, and cut a long list."""
    counted = [f"{reason} ({count})" if count > 1 else reason for reason, count in Counter(reasons).items()]
    more = [f"and {len(counted) - _SHOWN} more"] if len(counted) > _SHOWN else []
    return ", ".join([*counted[:_SHOWN], *more])
