"""Keys and values of answers that join and leave, each at a position of its own."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from florence2.model.bart import Decoder, DecoderLayer
from florence2.model.cache import DecoderCache, KeysValues

_ROWS = 8  # answers whose room is added at a time
_ROOM = 64  # positions that are added at a time


class SlotCache(DecoderCache):
    """A `DecoderCache` of up to `slots` answers, K beams each.

    An answer joins by writing the keys and values of its memory into the next slot; when it leaves, one of the
    last moves into its place. Slots beyond an answer's own memory and past hold zeros and are masked, so what an answer
    reads does not depend on its neighbours.

    Attributes:
        positions: How many ids each running answer has read.
    """

    def __init__(self, decoder: Decoder, beams: int, slots: int, device: torch.device):
        self.beams, self.slots = beams, slots
        self.positions: list[int] = []
        self.ancestry = torch.zeros(slots, beams, 0, dtype=torch.bool, device=device)
        self.projected: list[KeysValues] = []
        self._layers = [cast(DecoderLayer, layer).encoder_attn for layer in decoder.layers]
        self._memory: list[tuple[Tensor, Tensor] | None] = [None] * len(decoder.layers)
        self._memory_lengths: list[int] = []
        self._own: list[tuple[Tensor, Tensor] | None] = [None] * len(decoder.layers)
        self._written = torch.zeros(0, beams, dtype=torch.long, device=device)
        self._block: slice | None = None  # the slots that were opened last, where all answers are at one position

    def join(self, memory: Tensor) -> range:
        """Start answers over `memory` (B, S, D); return their rows among the running ones, the last."""
        count, length = memory.shape[:2]
        rows = range(len(self.positions), len(self.positions) + count)
        for i, attention in enumerate(self._layers):
            new = attention.keys_values(memory)  # (B, heads, S, d) each
            kept = self._memory[i] = self._grown(self._memory[i], new, rows.stop, length)
            for storage, values in zip(kept, new, strict=True):
                storage[rows.start : rows.stop, :, :length] = values
        self.positions += [0] * count
        self._memory_lengths += [length] * count
        self._show_memory()
        return rows

    def keep(self, rows: Tensor) -> None:
        """Continue with the answers `rows` (B',) alone, in this order; each stays where it is or moves down."""
        kept = rows.tolist()
        for storages, ends in ((self._memory, self._memory_lengths), (self._own, self._own_ends())):
            for storage in _tensors(storages):
                for new, old in enumerate(kept):
                    if new != old:
                        longest = max(ends[new], ends[old])
                        storage[new, :, :longest] = storage[old, :, :longest]
                storage[len(kept) : len(ends), :, : max(ends)] = 0  # what is left behind may not reach a later answer
        self.ancestry[: len(kept)] = self.ancestry[rows]
        self.ancestry[len(kept) :] = False
        self.positions = [self.positions[row] for row in kept]
        self._memory_lengths = [self._memory_lengths[row] for row in kept]
        self._show_memory()

    def advance(self) -> None:
        """Open the next position of every answer."""
        running, room = len(self.positions), (max(self.positions) + 1) * self.beams
        if self.ancestry.shape[2] < room:
            self.ancestry = _widened(self.ancestry, self.slots, _round_up(room))
        starts = torch.tensor(self.positions, device=self.ancestry.device)[:, None] * self.beams
        self._written = starts + torch.arange(self.beams, device=starts.device)  # (B, K): the slot of each beam
        # answers that began together, which is common, are written as one block, and sooner
        self._block = slice(room - self.beams, room) if len(set(self.positions)) == 1 else None
        self.ancestry[:running].scatter_(2, self._written[:, :, None], True)
        self.positions = [position + 1 for position in self.positions]

    def reorder(self, parents: Tensor) -> None:
        """Let beam k of a running answer continue its beam `parents[b, k]`: (B, K) long."""
        if self.beams > 1:
            past = self.ancestry[: len(parents)]
            past.copy_(past.gather(1, parents[:, :, None].expand_as(past)))

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Write the newest position of `layer`, (B, heads, K, d) each; return all that its queries may look at."""
        running, end = len(keys), max(self.positions) * self.beams
        kept = self._own[layer] = self._grown(self._own[layer], (keys, values), running, end)
        for storage, new in zip(kept, (keys, values), strict=True):
            if self._block is not None:
                storage[:running, :, self._block] = new
            else:
                storage[:running].scatter_(2, self._written[:, None, :, None].expand_as(new), new)
        seen_keys, seen_values = (storage[:running, :, :end] for storage in kept)
        return KeysValues(seen_keys, seen_values, self.ancestry[:running, None, :, :end])  # (B, 1, K, slots)

    def embed_position(self, table: torch.nn.Module) -> Tensor:
        """Return the embedding (B·K, 1, D), or (1, 1, D) for all, of the position that `advance` opens next."""
        rows: dict[int, Tensor] = {position: table(position, 1) for position in set(self.positions)}  # (1, D) each
        if len(rows) == 1:
            return rows[self.positions[0]][None]  # (1, 1, D): the same for all
        embedded = torch.cat([rows[position] for position in self.positions])  # (B, D)
        return embedded.repeat_interleave(self.beams, dim=0)[:, None]

    def _own_ends(self) -> list[int]:
        return [position * self.beams for position in self.positions]

    def _show_memory(self) -> None:
        """Make the views of the running answers' memories, with a mask where their lengths differ."""
        if not self.positions:
            self.projected = []
            return
        lengths = torch.tensor(self._memory_lengths, device=self.ancestry.device)
        longest = max(self._memory_lengths)
        mask = None
        if min(self._memory_lengths) < longest:
            mask = (torch.arange(longest, device=lengths.device) < lengths[:, None])[:, None, None, :]  # (B, 1, 1, S)
        running = len(self.positions)
        self.projected = [
            KeysValues(keys[:running, :, :longest], values[:running, :, :longest], mask)
            for keys, values in (pair for pair in self._memory if pair is not None)
        ]

    def _grown(
        self, kept: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor], rows: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return storages (at least `rows`, heads, at least `length`, d) of what `kept` held, for values like `new`."""
        if kept is None:
            keys, values = (each.new_zeros(0, each.shape[1], 0, each.shape[3]) for each in new)
            kept = keys, values
        has_rows, has_length = kept[0].shape[0], kept[0].shape[2]
        if has_rows < rows or has_length < length:
            # in steps, so that answers are rarely moved and few take about the memory that is planned for few
            more_rows = has_rows if rows <= has_rows else min(self.slots, -(-rows // _ROWS) * _ROWS)
            keys, values = (_widened(each, more_rows, max(has_length, _round_up(length))) for each in kept)
            kept = keys, values
        return kept


def _tensors(pairs: list[tuple[Tensor, Tensor] | None]) -> Iterator[Tensor]:
    return (tensor for pair in pairs if pair is not None for tensor in pair)


def _widened(storage: Tensor, rows: int, length: int) -> Tensor:
    """Return `storage` (old rows, ..., old length[, d]) with its first and third dimensions grown, by zeros."""
    # zeros, not empty: a masked slot that held infinity would still spoil its neighbours
    new = storage.new_zeros(rows, storage.shape[1], length, *storage.shape[3:])
    new[: storage.shape[0], :, : storage.shape[2]] = storage
    return new


def _round_up(length: int) -> int:
    return -(-length // _ROOM) * _ROOM
