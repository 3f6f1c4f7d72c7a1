"""Answers in buffers that never move: rows of a bucket, each at a position of its own, and the step over all of them.

The plain counterparts are `generation.engine.slots`, whose rows are compact, and `model.cache`. Here a row stays where
it is, and an answer that ended leaves an idle row, which computes along and is never read. So a step depends on its
bucket and the options alone: it is recorded once and replayed for every prompt and any mixture of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from florence2.fast.cuda.recorded.graphs import Recorded, Recorder, round_up
from florence2.fast.cuda.search import fuse
from florence2.generation.budget import generation_bytes
from florence2.generation.options import GenerationOptions
from florence2.generation.search import start_search
from florence2.generation.state import SearchState, SpecialIds
from florence2.model.bart import POSITION_OFFSET, Attention, Decoder, DecoderLayer, Positions
from florence2.model.cache import DecoderCache, KeysValues
from florence2.model.config import Florence2Config
from florence2.model.florence2 import Florence2Model

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Answers that a step has buffers for."""
MEMORY_STEP = 128
"""Positions by which the memory of a bucket grows: base's 577 image tokens and a usual prompt need 640."""
WINDOWS = (64, 128, 256, 512, 1024)
"""Positions of the answer that a step looks at: a short answer does not attend to a long one's empty slots."""

_MOST_ROWS = 3  # for each answer: where one joins those that fill a bucket, it moves to another of twice the rows


@dataclass(frozen=True)
class Bucket:
    """The sizes of buffers: answers, positions of their memories, and positions of the answers themselves."""

    rows: int
    memory: int
    window: int

    @classmethod
    def around(cls, rows: int, memory: int, window: int, limit: int) -> "Bucket":
        """Return the bucket for so many answers, and the longest of their memories and of the answers themselves."""
        return cls(round_up(rows, ROWS), round_up(memory, (MEMORY_STEP,)), min(round_up(window, WINDOWS), limit))

    def holds(self, other: "Bucket") -> bool:
        """Return whether all that fits into `other` fits into this one."""
        return self.rows >= other.rows and self.memory >= other.memory and self.window >= other.window


def planned_bytes(config: Florence2Config, options: GenerationOptions, memory_length: int, dtype: torch.dtype) -> int:
    """Estimate the bytes that one answer takes at most in buffers of a bucket, idle rows included."""
    limit = min(options.max_new_tokens, config.text.max_position_embeddings)
    bucket = Bucket.around(1, memory_length, limit, limit)
    return _MOST_ROWS * generation_bytes(config, options, bucket.memory, dtype)


class SlotBuffers(DecoderCache):
    """The keys and values of a bucket's rows, where a recorded step finds them.

    Attributes:
        position: (R,) long: how many ids each row has read.
        stopped: (R,) bool: rows whose answer is complete, or that have none; their position stays.
    """

    def __init__(self, decoder: Decoder, beams: int, bucket: Bucket, stopped: Tensor):
        self.beams, self.stopped, self._window = beams, stopped, bucket.window
        device, rows = stopped.device, bucket.rows
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self.written = torch.zeros(rows, beams, dtype=torch.long, device=device)
        self.ancestry = torch.zeros(rows, beams, bucket.window * beams, dtype=torch.bool, device=device)
        self._beams = torch.arange(beams, device=device)
        # an idle row looks at all of it, so that no softmax is over nothing
        self.memory_mask = torch.ones(rows, bucket.memory, dtype=torch.bool, device=device)
        layers = [cast(DecoderLayer, layer) for layer in decoder.layers]
        self._projections = [layer.encoder_attn for layer in layers]
        pairs = [_zeros(layer.encoder_attn, rows, bucket.memory) for layer in layers]
        self.projected = [KeysValues(*pair, self.memory_mask[:, None, None, :]) for pair in pairs]  # mask (R, 1, 1, S)
        self.past_buffers = [_zeros(layer.self_attn, rows, bucket.window * beams) for layer in layers]

    def join(self, rows: Tensor, memory: Tensor, mask: Tensor | None) -> None:
        """Start answers over `memory` (B, S, D) in the rows (B,), with nothing left of those before them."""
        length = memory.shape[1]
        for attention, (keys, values, *_) in zip(self._projections, self.projected, strict=True):
            for buffer, new in zip((keys, values), attention.keys_values(memory), strict=True):
                # all of the row: a masked position that held infinity would still spoil it
                buffer.index_fill_(0, rows, 0)
                buffer[:, :, :length].index_copy_(0, rows, new)
        for pair in self.past_buffers:
            for buffer in pair:
                buffer.index_fill_(0, rows, 0)
        self.memory_mask.index_fill_(0, rows, False)
        whole = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        self.memory_mask[:, :length].index_copy_(0, rows, whole if mask is None else mask.bool())
        self.ancestry.index_fill_(0, rows, False)
        self.position.index_fill_(0, rows, 0)

    def adopt(self, other: "SlotBuffers", rows: Tensor) -> None:
        """Continue with the rows (B,) of other buffers as the first rows of these."""
        mine, others = self.tensors(), other.tensors()
        for name, source in others.items():
            target, part = mine[name], source.index_select(0, rows)
            common = tuple(slice(min(sizes)) for sizes in zip(target.shape, part.shape, strict=True))
            target.zero_()
            target[common] = part[common]
        self.memory_mask[len(rows) :] = True

    def tensors(self) -> dict[str, Tensor]:
        """Return all that belongs to rows; the third dimension of keys and values, and the last of masks, may grow."""
        found = {"position": self.position, "ancestry": self.ancestry, "memory_mask": self.memory_mask}
        for i, ((keys, values, *_), (own_keys, own_values)) in enumerate(
            zip(self.projected, self.past_buffers, strict=True)
        ):
            found |= {f"{i}.memory_keys": keys, f"{i}.memory_values": values}
            found |= {f"{i}.own_keys": own_keys, f"{i}.own_values": own_values}
        return found

    def embed_position(self, table: nn.Module) -> Tensor:
        """Return the embedding (R·K, 1, D) of the position that `advance` opens next for each beam."""
        assert isinstance(table, Positions)
        embedded = table.weight.index_select(0, self._next() + POSITION_OFFSET)  # (R, D)
        return embedded[:, None].expand(-1, self.beams, -1).reshape(-1, 1, embedded.shape[1])

    def advance(self) -> None:
        """Open the next position of every row that runs."""
        self.written.copy_(self._next()[:, None] * self.beams + self._beams)
        self.ancestry.scatter_(2, self.written[:, :, None], True)
        self.position.add_(~self.stopped)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Write the newest position of `layer`, (R, heads, K, d) each; return all that its queries may look at."""
        pair = self.past_buffers[layer]
        for buffer, new in zip(pair, (keys, values), strict=True):
            buffer.scatter_(2, self.written[:, None, :, None].expand_as(new), new)
        return KeysValues(*pair, self.ancestry[:, None])  # (R, 1, K, slots)

    def reorder(self, parents: Tensor) -> None:
        """Let beam k of a row continue its beam `parents[b, k]`: (R, K) long."""
        if self.beams > 1:
            self.ancestry.copy_(self.ancestry.gather(1, parents[:, :, None].expand_as(self.ancestry)))

    def _next(self) -> Tensor:
        # a row that stopped at the end of its room has no next position, and computes the last again
        return self.position.clamp(max=self._window - 1)


class Steps(Recorded):
    """The buffers of a bucket, caches and search, and the steps over them. They serve one lane at a time."""

    def __init__(
        self, model: Florence2Model, options: GenerationOptions, ids: SpecialIds, bucket: Bucket, record: Recorder
    ):
        super().__init__(record, model.device)
        self.bucket = bucket
        self._fresh = fuse(start_search(1, options, ids, model.device)).with_room(bucket.window)
        self.state = _repeated(self._fresh, bucket.rows)
        self.state.done.fill_(True)
        self.cache = SlotBuffers(model.language_model.decoder, options.width, bucket, self.state.done)

    def join(self, rows: Sequence[int], memory: Tensor, mask: Tensor | None) -> None:
        """Start answers over `memory` (B, S, D) in the idle rows `rows`; `mask` (B, S) is True at real positions."""
        places = row_indices(rows, memory.device)
        self.cache.join(places, memory, mask)
        fresh = self._fresh.tensors()
        for name, buffer in self.state.tensors().items():
            buffer.index_copy_(0, places, fresh[name].expand(len(rows), *buffer.shape[1:]))

    def adopt(self, other: "Steps", rows: Sequence[int]) -> None:
        """Continue with the rows of other steps as the first rows of these; all others are idle."""
        places = row_indices(rows, self.state.done.device)
        self.cache.adopt(other.cache, places)
        part = other.state.pick(places).with_room(self.bucket.window)
        for name, value in part.tensors().items():
            self.state.tensors()[name][: len(rows)] = value
        self.state.done[len(rows) :] = True

    def leave(self, rows: Sequence[int]) -> None:
        """Let the rows be idle."""
        self.state.done.index_fill_(0, row_indices(rows, self.state.done.device), True)

    def advance(self, model: Florence2Model, numbers: Sequence[int], recorded: bool) -> None:
        """Choose the next id of every running row, whose step numbers are among `numbers`."""

        def work() -> None:
            logits = model.step(self.state.newest.flatten(), self.cache).float()  # as the plain search
            running = ~self.state.done
            # an idle row may have used all its room
            state = replace(self.state, generated=self.state.generated.clamp(max=self.bucket.window - 1))
            _copy_where(running, state.advance(logits, numbers), self.state)
            self.cache.reorder(self.state.parents)

        if recorded:
            self.do((numbers[0], numbers[-1]) if numbers else (), work)
        else:
            work()

    def tensors(self) -> Any:
        """Yield the buffers."""
        yield from self.cache.tensors().values()
        yield from self.state.tensors().values()


def row_indices(rows: Sequence[int], device: torch.device) -> Tensor:
    """Return rows as a tensor (B,) long on a device, without waiting for its work."""
    indices = torch.tensor(rows, dtype=torch.long)
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices.to(device)


def _zeros(attention: Attention, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return room for the keys and the values (rows, heads, length, d) of an attention."""

    def room(weight: Tensor) -> Tensor:
        return weight.new_zeros(rows, attention.heads, length, weight.shape[0] // attention.heads)

    # the width of a head follows from the weights
    return room(attention.k_proj.weight), room(attention.v_proj.weight)


def _repeated(state: SearchState, rows: int) -> SearchState:
    """Return `rows` copies of the state of one input, in buffers of their own."""
    copies: dict[str, Any] = {
        name: value.expand(rows, *value.shape[1:]).clone() for name, value in state.tensors().items()
    }
    return replace(state, **copies)


def _copy_where(rows: Tensor, source: SearchState, target: SearchState) -> None:
    """Copy the rows (R,) bool of every tensor of `source` into that of `target`, which stays where it is."""
    targets = target.tensors()
    for name, value in source.tensors().items():
        if value is not targets[name]:
            chosen = rows.view(-1, *[1] * (value.dim() - 1))
            torch.where(chosen, value, targets[name], out=targets[name])
