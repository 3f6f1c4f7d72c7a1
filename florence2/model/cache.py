"""What a decoder layer attends to: a whole sequence, or the cache of one generation."""

from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from florence2.errors import PromptError
from florence2.model.trace import NO_TRACE, Trace

if TYPE_CHECKING:
    from florence2.model.bart import Attention, Decoder, DecoderLayer


class KeysValues(NamedTuple):
    """Keys and values (B, heads, S, d) each, and which of them a query may look at.

    `mask` is bool, broadcastable to (B, heads, T, S), None for all; `causal` lets query t look at keys up to t.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    causal: bool = False


class KeySource(Protocol):
    """Where an attention finds its keys and values."""

    def as_queries(self, x: Tensor) -> Tensor:
        """Return the hidden states `x` in the shape (B, T, D) of queries."""
        ...

    def keys_values(self, attention: "Attention", x: Tensor, trace: Trace) -> KeysValues:
        """Return what the queries made of `x` may look at."""
        ...


class Itself:
    """Self-attention over a whole sequence, without a cache: the specification."""

    def __init__(self, mask: Tensor | None = None, causal: bool = False):
        self.mask, self.causal = mask, causal

    def as_queries(self, x: Tensor) -> Tensor:
        """Return `x` (B, T, D) unchanged."""
        return x

    def keys_values(self, attention: "Attention", x: Tensor, trace: Trace) -> KeysValues:
        """Project the sequence itself."""
        return KeysValues(*attention.keys_values(x, trace), self.mask, self.causal)


class Whole:
    """Cross-attention to another sequence (B, S, D), without a cache: the specification."""

    def __init__(self, sequence: Tensor, mask: Tensor | None = None):
        self.sequence, self.mask = sequence, mask

    def as_queries(self, x: Tensor) -> Tensor:
        """Return `x` (B, T, D) unchanged."""
        return x

    def keys_values(self, attention: "Attention", x: Tensor, trace: Trace) -> KeysValues:  # noqa: ARG002
        """Project the other sequence."""
        return KeysValues(*attention.keys_values(self.sequence, trace), self.mask)


class DecoderCache:
    """The keys and values of one generation; the call that started it owns them.

    Memory keys and values are computed once per image and seen by its K beams as K queries. Own keys and values are
    written once, at slot `position · K + beam`, and never moved: a reorder of beams changes `ancestry` alone, the mask
    that says which slots belong to a beam's past. So a reorder costs a few bytes, and a step reads the K·t slots once
    for all beams.
    """

    def __init__(
        self,
        decoder: "Decoder",
        memory: Tensor,
        beams: int,
        max_length: int,
        memory_mask: Tensor | None = None,
        trace: Trace = NO_TRACE,
    ):
        """Project `memory` (B, S, D) for every layer, and make room for `max_length` positions of `beams` beams.

        `memory_mask` (B, S) bool is True at real positions; None when all are.
        """
        self.beams, self.max_length, self.length = beams, max_length, 0
        self.ancestry = torch.zeros(len(memory), beams, max_length * beams, dtype=torch.bool, device=memory.device)
        mask = None if memory_mask is None else memory_mask[:, None, None, :]  # (B, 1, 1, S)
        self.projected: list[KeysValues] = []  # of the memory, by layer
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * len(decoder.layers)  # keys and values of the answer
        for i, layer in enumerate(decoder.layers):
            # the memory stays the same through the answer, so its keys and values do
            attention = cast("DecoderLayer", layer).encoder_attn
            keys, values = attention.keys_values(memory, trace.at(f"layers.{i}.cross_attention"))
            self.projected.append(KeysValues(keys, values, mask))

    def past(self, layer: int) -> "OwnPast":
        """Return the answer so far, as a layer's self-attention finds it."""
        return OwnPast(self, layer)

    def memory(self, layer: int) -> "CachedMemory":
        """Return the memory, as a layer's cross-attention finds it."""
        return CachedMemory(self, layer)

    def reorder(self, parents: Tensor) -> None:
        """Let beam k continue beam `parents[b, k]`: (B, K) long."""
        if self.beams > 1:
            self.ancestry = self.ancestry.gather(1, parents[:, :, None].expand_as(self.ancestry))

    def keep(self, rows: Tensor) -> None:
        """Continue with the images `rows` (B',) alone; slots that nobody has written yet are not copied."""
        self.ancestry = self.ancestry[rows]
        end = self.length * self.beams
        for layer, (keys, values, mask, _) in enumerate(self.projected):
            self.projected[layer] = KeysValues(keys[rows], values[rows], None if mask is None else mask[rows])
        for layer, pair in enumerate(self.own):
            if pair is not None:
                smaller = [tensor.new_empty(len(rows), *tensor.shape[1:]) for tensor in pair]
                for new, old in zip(smaller, pair, strict=True):
                    new[:, :, :end] = old[rows, :, :end]
                self.own[layer] = (smaller[0], smaller[1])

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Write the newest position of `layer`, (B, heads, K, d) each; return all that its queries may look at."""
        # the first write shows how many heads there are, and how wide
        all_keys, all_values = self.own[layer] or (self._room_for(keys), self._room_for(values))
        self.own[layer] = all_keys, all_values
        end = self.length * self.beams
        all_keys[:, :, end - self.beams : end] = keys
        all_values[:, :, end - self.beams : end] = values
        # a single beam may look at every slot that is written
        mask = None if self.beams == 1 else self.ancestry[:, None, :, :end]  # (B, 1, K, slots)
        return KeysValues(all_keys[:, :, :end], all_values[:, :, :end], mask)

    def _room_for(self, first: Tensor) -> Tensor:
        B, heads, _, d = first.shape
        return first.new_empty(B, heads, self.max_length * self.beams, d)

    def advance(self) -> None:
        """Open the next position; each beam's own slot there becomes part of its past.

        Raises PromptError when all `max_length` positions are used.
        """
        if self.length == self.max_length:
            raise PromptError(f"This cache has room for {self.max_length} positions, and all are used.")
        start = self.length * self.beams
        # beam k wrote slot k of this position, which no other beam has in its past
        own = torch.eye(self.beams, dtype=torch.bool, device=self.ancestry.device)
        self.ancestry[:, :, start : start + self.beams] = own
        self.length += 1

    def embed_position(self, table: "torch.nn.Module") -> Tensor:
        """Return the embedding (1, D) of the position that `advance` opens next."""
        embedding: Tensor = table(self.length, 1)
        return embedding

    def beams_as_queries(self, x: Tensor) -> Tensor:
        """Put the K beams of an image side by side: (B·K, 1, D) -> (B, K, D)."""
        return x.view(-1, self.beams, x.shape[-1])


class OwnPast:
    """The answer so far in the cache of a generation: the source of one layer's self-attention."""

    def __init__(self, cache: DecoderCache, layer: int):
        self.cache, self.layer = cache, layer

    def as_queries(self, x: Tensor) -> Tensor:
        """(B·K, 1, D) -> (B, K, D)"""
        return self.cache.beams_as_queries(x)

    def keys_values(self, attention: "Attention", x: Tensor, trace: Trace) -> KeysValues:
        """Write the newest position of every beam, `x` (B, K, D); return all that its queries may look at."""
        return self.cache.extend(self.layer, *attention.keys_values(x, trace))


class CachedMemory:
    """The memory in the cache of a generation, projected once: the source of one layer's cross-attention."""

    def __init__(self, cache: DecoderCache, layer: int):
        self.cache, self.layer = cache, layer

    def as_queries(self, x: Tensor) -> Tensor:
        """(B·K, 1, D) -> (B, K, D)"""
        return self.cache.beams_as_queries(x)

    def keys_values(self, attention: "Attention", x: Tensor, trace: Trace) -> KeysValues:  # noqa: ARG002
        """Return the projected memory."""
        return self.cache.projected[self.layer]
