"""The decoder of some questions: keys and values of their memories, shared by all sequences, and of the answers so far.

Dimensions: B questions, K sequences of each, R = B·K, T ids of an answer, S positions of the memory, D model,
V vocabulary.
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
    """Decodes K sequences over each of B memories, (1, S, D) each, which may differ in length."""

    def __init__(self, graphs: Graphs, text: TextConfig, memories: Sequence[Array]):
        self._graphs = graphs
        layers = text.decoder_layers
        self._past_names, self._present_names = (
            [*cache_names(prefix, "decoder", layers)] for prefix in ("past_key_values", "present")
        )
        self._cross_names = [*cache_names("past_key_values", "encoder", layers)]
        self._lengths = [memory.shape[1] for memory in memories]
        self._mask = _stack([np.ones((1, length), dtype=np.int64) for length in self._lengths], axis=1)  # (B, S)
        heads = text.decoder_attention_heads
        self._nothing = np.zeros((1, heads, 0, text.d_model // heads), dtype=np.float32)
        self._past: list[Array] = []

    def step(self, newest: Array) -> Array:
        """Decode the newest id of every sequence (R,) -> float32 logits (R, V) of the next.

        Raises Florence2Error for logits that are not finite.
        """
        return _finite(self._next(newest))

    def read(self, question: int, ids: Array) -> Iterator[Array]:
        """Read a whole answer (T,) to a question by teacher forcing; yield the logits of its positions, in parts.

        Yields (T', V) each. Raises Florence2Error for logits that are not finite.
        """
        return map(_finite, self._parts(question, ids))

    @abstractmethod
    def _next(self, newest: Array) -> Array:
        """Do what `step` does, unchecked."""

    @abstractmethod
    def _parts(self, question: int, ids: Array) -> Iterator[Array]:
        """Do what `read` does, unchecked."""

    def reorder(self, parents: Array, kept: Array) -> None:
        """Continue with the questions `kept` (B',) alone, and let sequence k continue `parents[k]`: (R',)."""
        self._past = [each[parents] for each in self._past]
        self._keep(parents, kept)

    @abstractmethod
    def _keep(self, parents: Array, kept: Array) -> None:
        """Do with the memories what `reorder` says."""

    def _embed(self, ids: Array) -> Array:
        """(R, T) -> (R, T, D)"""
        return self._graphs.embed(input_ids=ids)[0]


class SharedDecoder(GraphDecoder):
    """The decoder's step in a graph of its own, over keys and values that all sequences of a question share."""

    def __init__(self, graphs: Graphs, text: TextConfig, memories: Sequence[Array]):
        super().__init__(graphs, text, memories)
        assert graphs.step is not None and graphs.cross is not None
        self._graph = graphs.step
        names = [*cache_names("present", "encoder", text.decoder_layers)]
        # one memory at a time: together they would take more room and no less time
        cross = zip(*(graphs.cross(names, encoder_hidden_states=memory) for memory in memories), strict=True)
        self._all_cross = [_stack(each, axis=2) for each in cross]  # (B, heads, S, d) each
        self._cross = self._all_cross

    def _next(self, newest: Array) -> Array:
        """Decode one position."""
        past = self._past or [np.repeat(self._nothing, len(newest), axis=0)] * len(self._past_names)
        logits, self._past = self._run(newest[:, None], past, self._cross, self._mask)  # (R, 1, V)
        return logits[:, -1]

    def _parts(self, question: int, ids: Array) -> Iterator[Array]:
        """Read the answer part by part."""
        past = [self._nothing] * len(self._past_names)
        length = self._lengths[question]
        cross = [np.ascontiguousarray(each[question : question + 1, :, :length]) for each in self._all_cross]
        mask = np.ones((1, length), dtype=np.int64)
        for start in range(0, len(ids), _POSITIONS):
            logits, past = self._run(ids[None, start : start + _POSITIONS], past, cross, mask)  # (1, T', V)
            yield logits[0]

    def _run(self, ids: Array, past: Sequence[Array], cross: Sequence[Array], mask: Array) -> tuple[Array, list[Array]]:
        feeds = {"inputs_embeds": self._embed(ids), "encoder_attention_mask": mask}
        feeds |= zip(self._cross_names, cross, strict=True)
        feeds |= zip(self._past_names, past, strict=True)
        logits, *present = self._graph.run(feeds, ["logits", *self._present_names])
        return logits, present

    def _keep(self, parents: Array, kept: Array) -> None:  # noqa: ARG002
        """Leave out the memories of the other questions."""
        if len(kept) < len(self._mask):
            self._mask, self._cross = self._mask[kept], [each[kept] for each in self._cross]


class MergedDecoder(GraphDecoder):
    """The merged decoder of published folders, whose graphs need the memory once for each sequence."""

    def __init__(self, graphs: Graphs, text: TextConfig, memories: Sequence[Array]):
        super().__init__(graphs, text, memories)
        assert graphs.merged is not None
        self._graph: Graph = graphs.merged
        self._present_cross = [*cache_names("present", "encoder", text.decoder_layers)]
        self._memories = memories
        self._memory = _stack(memories, axis=1)  # (B, S, D), and (R, S, D) after the first step
        self._cross: list[Array] = []  # (R, heads, S, d) each

    def _next(self, newest: Array) -> Array:
        """Decode one position; the first one, where all sequences of a question are the same, only once."""
        if self._cross:
            return self._later(newest)
        width = len(newest) // len(self._memory)
        outputs = ["logits", *self._present_names, *self._present_cross]
        first = self._first(newest[::width, None], self._memory, self._mask, outputs)
        logits, *present = (np.repeat(each, width, axis=0) for each in first)
        self._past, self._cross = present[: len(self._past_names)], present[len(self._past_names) :]
        self._memory, self._mask = (np.repeat(each, width, axis=0) for each in (self._memory, self._mask))
        return logits[:, -1]

    def _parts(self, question: int, ids: Array) -> Iterator[Array]:
        """Read the answer at once: a published branch with past keys and values reads one id alone."""
        memory = self._memories[question]
        yield self._first(ids[None], memory, np.ones(memory.shape[:2], dtype=np.int64), ["logits"])[0][0]

    def _first(self, ids: Array, memory: Array, mask: Array, outputs: Sequence[str]) -> list[Array]:
        """Read ids (B, T) from the beginning."""
        feeds = {
            "inputs_embeds": self._embed(ids),
            "encoder_hidden_states": memory,
            "encoder_attention_mask": mask,
            USE_CACHE: np.zeros(1, dtype=bool),
        }
        nothing = np.repeat(self._nothing, len(ids), axis=0)
        feeds |= dict.fromkeys([*self._past_names, *self._cross_names], nothing)
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

    def _keep(self, parents: Array, kept: Array) -> None:  # noqa: ARG002
        """Leave out the memories of the other questions; the sequences of one have the same."""
        if len(parents) < len(self._mask):
            self._memory, self._mask = self._memory[parents], self._mask[parents]
            self._cross = [each[parents] for each in self._cross]


def _finite(logits: Array) -> Array:
    """Return logits (..., V). Raises Florence2Error where they give no probabilities."""
    # the largest value is NaN where any is, and the search would take NaN for the best
    if not np.isfinite(logits.max(axis=-1)).all():
        raise Florence2Error(
            "The decoder's logits are not finite: its weights, or what they compute, do not fit the type of the "
            "graphs; export the model in float32."
        )
    return logits


def _stack(arrays: Sequence[Array], axis: int) -> Array:
    """Join arrays (1, ...) to (B, ...); those that are shorter along `axis` end in zeros."""
    if len(arrays) == 1:
        return arrays[0]
    longest = max(each.shape[axis] for each in arrays)
    shape = [*arrays[0].shape]
    shape[0], shape[axis] = len(arrays), longest
    joined = np.zeros(shape, dtype=arrays[0].dtype)
    for place, each in zip(joined, arrays, strict=True):
        place.swapaxes(0, axis - 1)[: each.shape[axis]] = each[0].swapaxes(0, axis - 1)
    return joined


def start_decoder(graphs: Graphs, text: TextConfig, memories: Sequence[Array]) -> GraphDecoder:
    """Return what decodes the answers to questions, whose images and prompts are `memories` (1, S, D)."""
    kind = SharedDecoder if graphs.merged is None else MergedDecoder
    return kind(graphs, text, memories)
