"""The vision tower and the text encoder by replay, for rows and lengths of a bucket; the rest of a bucket is padding.

The plain counterparts are `Florence2Model.encode_image` and `Florence2Model.encode`, which the recordings hold.
"""

from collections.abc import Callable, Hashable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.fast.cuda.recorded.graphs import (
    ENCODER,
    VISION,
    Recorded,
    Recorder,
    StageWatch,
    ordinary_tensors,
    recorder_for,
    recordings,
    round_up,
    stream_of,
    watch,
)
from florence2.fast.cuda.recorded.slots import MEMORY_STEP
from florence2.model.florence2 import Florence2Model

TOGETHER = (1, 2, 4, 8)
"""Images or prompts that are encoded together; more fill the device by themselves, and come in parts."""


class FixedStage(Recorded):
    """A stage with input buffers of one shape, and its output's."""

    def __init__(self, inputs: list[Tensor], record: Recorder):
        super().__init__(record, inputs[0].device)
        self.inputs, self.output = inputs, torch.empty(0)

    def run(self, compute: Callable[..., Tensor]) -> Tensor:
        """Return `compute(*inputs)`, in a buffer that the next run writes into."""

        def work() -> None:
            computed = compute(*self.inputs)
            if self.output.shape != computed.shape:  # the first time, which is not recorded
                with ordinary_tensors():
                    self.output = torch.empty_like(computed)
            self.output.copy_(computed)

        self.do((), work)
        return self.output

    def tensors(self) -> Iterator[Tensor]:
        """Yield the buffers."""
        yield from (*self.inputs, self.output)


def encode_image_recorded(
    model: Florence2Model,
    pixel_values: Tensor,
    compute: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """Return `compute(pixel_values)`, the model's plain way (B, 3, H, W) -> (B, N, D), by replay.

    None where it may not be recorded.
    """
    record = recorder_for(model.device)
    if record is None or pixel_values.dim() != 4 or not len(pixel_values):
        return None
    now = watch(model, VISION)
    if now.reason is not None:
        return None
    encoded = []
    for part in torch.split(pixel_values, TOGETHER[-1]):
        padded = _with_rows(part.to(model.device, model.dtype), round_up(len(part), TOGETHER))
        encoded.append(_replay(model, now, [padded], compute, record)[: len(part)])
    return torch.cat(encoded) if len(encoded) > 1 else encoded[0]


def encode_recorded(
    model: Florence2Model,
    image_features: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    compute: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor | None:
    """Return `compute(image_features, input_ids, attention_mask)`, the model's plain way, by replay.

    Prompts are padded up to their bucket, and the padding is masked; the result has the length that the plain way
    gives, (B, N + S, D). None where it may not be recorded.
    """
    record = recorder_for(model.device)
    text = model.config.text
    length = image_features.shape[1] + input_ids.shape[1]
    known = image_features.dtype == model.dtype and len(image_features) == len(input_ids) > 0
    if record is None or not known or length > text.max_position_embeddings:  # the plain way says what is wrong
        return None
    now = watch(model, ENCODER)
    if now.reason is not None:
        return None
    prompt_room = min(round_up(length, (MEMORY_STEP,)), text.max_position_embeddings) - image_features.shape[1]
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    missing = prompt_room - input_ids.shape[1]
    ids, mask = F.pad(input_ids, (0, missing), value=text.pad_token_id), F.pad(mask, (0, missing))
    encoded = []
    for part in zip(*(torch.split(each, TOGETHER[-1]) for each in (image_features, ids, mask)), strict=True):
        rows = round_up(len(part[0]), TOGETHER)
        memory = _replay(model, now, [_with_rows(each, rows) for each in part], compute, record)
        encoded.append(memory[: len(part[0]), :length])
    return torch.cat(encoded) if len(encoded) > 1 else encoded[0].contiguous()


def _replay(
    model: Florence2Model, now: StageWatch, inputs: list[Tensor], compute: Callable[..., Tensor], record: Recorder
) -> Tensor:
    """Return what a stage of the model, which is as `now` says, computes from inputs that fill a bucket."""
    shapes = tuple((tuple(each.shape), each.dtype) for each in inputs)
    key: Hashable = now.part, shapes, record, stream_of(model.device), now.key
    kept = recordings(model)
    stage = kept.take(key, lambda: FixedStage([torch.zeros_like(each) for each in inputs], record))
    for buffer, value in zip(stage.inputs, inputs, strict=True):
        buffer.copy_(value)
    output = stage.run(compute).clone()
    kept.give(key, stage, model.device)
    return output


def _with_rows(values: Tensor, rows: int) -> Tensor:
    """Return `values` (B, ...) with the last row repeated up to `rows` (rows, ...): no other could be a new problem."""
    return (
        values
        if len(values) == rows
        else torch.cat([values, values[-1:].expand(rows - len(values), *values.shape[1:])])
    )
