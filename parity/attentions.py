"""Compare attention weights and hidden states with those of the native model, layer by layer."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from florence2.inspect import Tracing
from florence2.model.florence2 import Florence2Model
from parity.references import Inside, Native
from parity.report import Comparison, largest_difference

_STAGES = {
    "windows": "vision_tower.blocks.*.*.spatial_block.window_attn.weights",
    "channel groups": "vision_tower.blocks.*.*.channel_block.channel_attn.weights",
    "vision blocks": "=vision_tower.blocks.*.*.channel_block",
    "encoder attention": "encoder.layers.*.self_attention.weights",
    "encoder layers": "=encoder.layers.*",
    "decoder self-attention": "decoder.layers.*.self_attention.weights",
    "cross-attention": "decoder.layers.*.cross_attention.weights",
    "decoder layers": "=decoder.layers.*",
}
"""The stages and the trace names of their values, in the order of the reference's tuples."""


def compare_inside(
    group: str,
    subject: str,
    ours: Florence2Model,
    reference: Native,
    pixels: Sequence[Tensor],
    prompts: Sequence[list[int]],
    decoder_ids: list[int],
) -> Iterator[Comparison]:
    """Compare the reference's `output_attentions` and `output_hidden_states` with a trace of the same pass.

    Where values exceed 1, the difference is relative to the largest: with random weights of the base shape the vision
    tower's residual stream grows to 3e9.
    """
    worst, total, equal = dict.fromkeys(_STAGES, 0.0), dict.fromkeys(_STAGES, 0), dict.fromkeys(_STAGES, 0)
    for pixel_values in pixels:
        for ids in prompts:
            mine = trace_inside(ours, pixel_values, ids, decoder_ids)
            theirs = reference.inside(pixel_values, ids, decoder_ids)
            for stage in _STAGES:
                pairs = list(zip(mine[stage], theirs[stage], strict=True))
                comparable = [(a, b) for a, b in pairs if a.shape == b.shape]
                apart = (largest_difference(a, b) / max(1.0, float(b.abs().max())) for a, b in comparable)
                worst[stage] = max([worst[stage], *apart])
                total[stage], equal[stage] = total[stage] + len(pairs), equal[stage] + len(comparable)
    for stage, difference in worst.items():
        dtype = str(ours.dtype).removeprefix("torch.")
        yield Comparison(group, subject, f"{stage}, {dtype}", equal[stage], total[stage], difference)


def trace_inside(model: Florence2Model, pixel_values: Tensor, ids: list[int], decoder_ids: list[int]) -> Inside:
    """Run one pass of our model; return the values of every stage, layer by layer."""
    tracing = Tracing(model.config, _STAGES.values(), limit=1 << 40)
    recording = tracing.start()
    with torch.no_grad():
        features = model.encode_image(pixel_values, recording)
        memory = model.encode(features, torch.tensor([ids]), trace=recording)
        model.decode(torch.tensor([decoder_ids]), memory, trace=recording)
    return {stage: [recording.values[name][0] for name in tracing.chosen[p]] for stage, p in _STAGES.items()}
