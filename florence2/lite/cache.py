"""The decoder of one question: keys and values of its memory, shared by all K sequences, and of the answers so far.

Dimensions: K sequences, T ids of an answer, S positions of the memory, D model, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from florence2.errors import Florence2Error
from florence2.lite.layout import USE_CACHE, cache_names
from florence2.lite.search.arrays import Array
from florence2.lite.sessions import Graph, Graphs
from florence2.model.config import TextConfig

_POSITIONS = 64  # whose logits (V) exist at one moment


class GraphDecoder(ABC):
    """Decodes K sequences over one memory (1, S, D)."""

    def __init__(self, graphs: Graphs, text: TextConfig, memory: Array):
        self._graphs, self._memory = graphs, memory
        layers = text.decoder_layers
        self._past_names, self._present_names = (
            [*cache_names(prefix, "decoder", layers)] for prefix in ("past_key_values", "present")
        )
        self._cross_names = [*cache_names("past_key_values", "encoder", layers)]
        self._mask = np.ones(memory.shape[:2], dtype=np.int64)  # (1, S)
        heads = text.decoder_attention_heads
        self._nothing = np.zeros((1, heads, 0, text.d_model // heads), dtype=np.float32)
        self._past: list[Array] = []

    def step(self, newest: Array) -> Array:
        """Decode the newest id of every sequence (K,) -> float32 logits (K, V) of the next.

        Raises Florence2Error for logits that are not finite.
        """
        return _finite(self._next(newest))

    def read(self, ids: Array) -> Iterator[Array]:
        """Read a whole sequence (T,) by teacher forcing; yield the logits of its positions, some (..., V) at a time.

        Raises Florence2Error for logits that are not finite.
        """
        return map(_finite, self._parts(ids))

    @abstractmethod
    def _next(self, newest: Array) -> Array:
        """Do what `step` does, unchecked."""

    @abstractmethod
    def _parts(self, ids: Array) -> Iterator[Array]:
        """Do what `read` does, unchecked."""

    def reorder(self, parents: Array) -> None:
        """Let sequence k continue sequence `parents[k]`: (K,)."""
        self._past = [each[parents] for each in self._past]

    def _embed(self, ids: Array) -> Array:
        """(K, T) -> (K, T, D)"""
        return self._graphs.embed(input_ids=ids)[0]


class SharedDecoder(GraphDecoder):
    """The decoder's step in a graph of its own, over keys and values of the memory that all sequences share."""

    def __init__(self, graphs: Graphs, text: TextConfig, memory: Array):
        super().__init__(graphs, text, memory)
        assert graphs.step is not None and graphs.cross is not None
        self._graph = graphs.step
        names = [*cache_names("present", "encoder", text.decoder_layers)]
        cross = graphs.cross(names, encoder_hidden_states=memory)  # (1, heads, S, d) each
        self._cross = dict(zip(self._cross_names, cross, strict=True))

    def _next(self, newest: Array) -> Array:
        """Decode one position."""
        past = self._past or [np.repeat(self._nothing, len(newest), axis=0)] * len(self._past_names)
        logits, self._past = self._run(newest[:, None], past)  # (K, 1, V)
        return logits[:, -1]

    def _parts(self, ids: Array) -> Iterator[Array]:
        """Read the sequence part by part."""
        past = [self._nothing] * len(self._past_names)
        for start in range(0, len(ids), _POSITIONS):
            logits, past = self._run(ids[None, start : start + _POSITIONS], past)  # (1, T', V)
            yield logits[0]

    def _run(self, ids: Array, past: Sequence[Array]) -> tuple[Array, list[Array]]:
        feeds = {"inputs_embeds": self._embed(ids), "encoder_attention_mask": self._mask, **self._cross}
        feeds |= zip(self._past_names, past, strict=True)
        logits, *present = self._graph.run(feeds, ["logits", *self._present_names])
        return logits, present


class MergedDecoder(GraphDecoder):
    """The merged decoder of published folders, whose graphs need the memory once for each sequence."""

    def __init__(self, graphs: Graphs, text: TextConfig, memory: Array):
        super().__init__(graphs, text, memory)
        assert graphs.merged is not None
        self._graph: Graph = graphs.merged
        self._present_cross = [*cache_names("present", "encoder", text.decoder_layers)]
        self._cross: list[Array] = []  # (K, heads, S, d) each

    def _next(self, newest: Array) -> Array:
        """Decode one position; the first one, where all sequences are the same, only once."""
        if self._cross:
            return self._later(newest)
        outputs = ["logits", *self._present_names, *self._present_cross]
        logits, *present = (np.repeat(each, len(newest), axis=0) for each in self._first(newest[:1], outputs))
        self._past, self._cross = present[: len(self._past_names)], present[len(self._past_names) :]
        self._memory, self._mask = (np.repeat(each, len(newest), axis=0) for each in (self._memory, self._mask))
        return logits[:, -1]

    def _parts(self, ids: Array) -> Iterator[Array]:
        """Read the sequence at once: a published branch with past keys and values reads one id alone."""
        yield self._first(ids, ["logits"])[0][0]

    def _first(self, ids: Array, outputs: Sequence[str]) -> list[Array]:
        """Read ids (T,) from the beginning."""
        feeds = {
            "inputs_embeds": self._embed(ids[None]),
            "encoder_hidden_states": self._memory[:1],
            "encoder_attention_mask": self._mask[:1],
            USE_CACHE: np.zeros(1, dtype=bool),
        }
        feeds |= dict.fromkeys([*self._past_names, *self._cross_names], self._nothing)
        return self._graph.run(feeds, outputs)

    def _later(self, newest: Array) -> Array:
        feeds = {
            "inputs_embeds": self._embed(newest[:, None]),
            "encoder_hidden_states": self._memory,
            "encoder_attention_mask": self._mask,
            USE_CACHE: np.ones(1, dtype=bool),
        }
        feeds |= zip(self._past_names, self._past, strict=True)
        feeds |= zip(self._cross_names, self._cross, strict=True)
        logits, *self._past = self._graph.run(feeds, ["logits", *self._present_names])
        return logits[:, -1]


def _finite(logits: Array) -> Array:
    """Return logits (..., V). Raises Florence2Error where they give no probabilities."""
    # the largest value is NaN where any is, and the search would take NaN for the best
    if not np.isfinite(logits.max(axis=-1)).all():
        raise Florence2Error(
            "The decoder's logits are not finite: its weights, or what they compute, do not fit the type of the "
            "graphs; export the model in float32."
        )
    return logits


def start_decoder(graphs: Graphs, text: TextConfig, memory: Array) -> GraphDecoder:
    """Return what decodes the answers to one question, whose image and prompt are `memory` (1, S, D)."""
    kind = SharedDecoder if graphs.merged is None else MergedDecoder
    return kind(graphs, text, memory)
