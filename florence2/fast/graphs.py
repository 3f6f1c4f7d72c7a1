"""Generation by replay: a step is recorded once, over buffers that stay where they are, and then repeated.

On a CUDA device a step of the decoder is a few hundred small kernels, and starting them one by one from Python takes
longer than running them; a CUDA graph starts all with one call. Nothing in a step asks the host: the search is
`SearchState.advance`, the cache keeps its position on the device, and whether all is done is read two steps late.
Not timed yet: the tests run the same code on a CPU, where recording means calling.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from florence2.generation.options import GenerationOptions
from florence2.generation.search import Generation, SearchState, SpecialIds, logit_rules, start_search
from florence2.model.bart import POSITION_OFFSET, Decoder, DecoderCache, Positions
from florence2.model.florence2 import Florence2Model

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Work that only touches fixed buffers -> a call that does it again."""

_FIRST_WINDOW = 64  # positions; every next window is twice as long, so that short answers do not attend to emptiness
_LATE = 2  # steps between asking whether all is done and looking at the answer
_KEPT = 2  # generators per model that wait for a call of their shape


class StaticCache(DecoderCache):
    """A cache whose buffers never move and whose position is a tensor, so that a recorded step can be replayed."""

    def __init__(
        self, decoder: Decoder, memory: Tensor, beams: int, max_length: int, memory_mask: Tensor | None = None
    ):
        super().__init__(decoder, memory, beams, max_length, memory_mask)
        for pair in self.own:
            for values in pair:
                values.zero_()  # what is not written yet is attended to with weight 0, and 0 x NaN would be NaN
        self.position = torch.zeros(1, dtype=torch.long, device=memory.device)
        self.slots = torch.arange(beams, device=memory.device)
        self.window = max_length
        """How many positions a step looks at; the rest must be empty."""

    def restart(self, decoder: Decoder, memory: Tensor, memory_mask: Tensor | None) -> None:
        """Forget everything, and take another memory of the same shape."""
        fresh = DecoderCache(decoder, memory, self.beams, 0, memory_mask)
        for old, new in zip(self.memory, fresh.memory, strict=True):
            old[0].copy_(new[0])
            old[1].copy_(new[1])
        if self.memory_mask is not None and fresh.memory_mask is not None:
            self.memory_mask.copy_(fresh.memory_mask)
        self.ancestry.zero_()
        self.position.zero_()

    def embed_position(self, table: Positions) -> Tensor:
        return table.weight.index_select(0, self.position + POSITION_OFFSET)

    def advance(self) -> None:
        own = torch.eye(self.beams, dtype=torch.bool, device=self.ancestry.device).expand(len(self.ancestry), -1, -1)
        self.slots.copy_(self.position * self.beams + torch.arange(self.beams, device=self.slots.device))
        self.ancestry.index_copy_(2, self.slots, own)
        self.position.add_(1)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        all_keys, all_values = self.own[layer]
        all_keys.index_copy_(2, self.slots, keys)
        all_values.index_copy_(2, self.slots, values)
        end = self.window * self.beams
        return all_keys[:, :, :end], all_values[:, :, :end], self.ancestry[:, None, :, :end]

    def reorder(self, parents: Tensor) -> None:
        self.ancestry.copy_(self.ancestry.gather(1, parents[:, :, None].expand_as(self.ancestry)))


class GraphedGenerator:
    """The buffers of generations of one shape, and their recorded steps. For one call at a time."""

    def __init__(
        self,
        model: Florence2Model,
        memory: Tensor,
        options: GenerationOptions,
        ids: SpecialIds,
        memory_mask: Tensor | None,
        record: Recorder,
    ):
        self.record, self.options = record, options
        self.cache = StaticCache(
            model.language_model.decoder, memory, options.num_beams, options.max_new_tokens, memory_mask
        )
        self.empty = start_search(len(memory), options, ids, memory.device)
        self.state = _with_own_buffers(self.empty)
        self.all_done = torch.zeros(1, dtype=torch.bool, device=memory.device)
        self.recorded: dict[Any, Callable[[], None] | None] = {}

    def run(self, model: Florence2Model, memory: Tensor, memory_mask: Tensor | None) -> Generation:
        """Answer `memory`, which has the shape that this was made for."""
        self.cache.restart(model.language_model.decoder, memory, memory_mask)
        _copy(self.empty, self.state)
        flags = _LateFlags(self.all_done)
        for n in range(1, self.options.max_new_tokens + 1):
            self._step(model, n)
            if flags.ask():
                break
        return _with_own_buffers(self.state).finish()

    def _step(self, model: Florence2Model, n: int) -> None:
        """The n-th step: as it is the first time that its kind occurs, recorded the second time, then replayed."""
        window = _FIRST_WINDOW
        while window < n:
            window *= 2
        self.cache.window = min(window, self.options.max_new_tokens)
        rules = logit_rules(self.options, self.state.ids)
        kind = (self.cache.window, *(rule.applies(n - 1) for rule in rules))

        def work() -> None:
            logits = model.step(self.state.newest.flatten(), self.cache)
            _copy(self.state.advance(logits, n), self.state)
            self.cache.reorder(self.state.parents)
            self.all_done.copy_(self.state.done.all())

        if kind not in self.recorded:
            self.recorded[kind] = None
            work()
            return
        replay = self.recorded[kind] or self.record(work)
        self.recorded[kind] = replay
        replay()


class _LateFlags:
    """Reads a flag of the device some steps after it was set, so that the host never waits for the device."""

    def __init__(self, flag: Tensor):
        self.flag = flag
        self.asked: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def ask(self) -> bool:
        """What the flag said `_LATE` steps ago; on a CPU, what it says now."""
        if self.flag.device.type != "cuda":
            return bool(self.flag)
        copy = torch.empty(1, dtype=torch.bool, pin_memory=True)
        copy.copy_(self.flag, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.asked.append((copy, event))
        if len(self.asked) <= _LATE:
            return False
        copy, late = self.asked.pop(0)
        assert late is not None
        late.synchronize()
        return bool(copy)


def record_cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a CUDA graph; recording does not do it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


_lock = threading.Lock()
_idle: "weakref.WeakKeyDictionary[Florence2Model, list[tuple[Any, GraphedGenerator]]]" = weakref.WeakKeyDictionary()


def generate_graphed(
    model: Florence2Model,
    memory: Tensor,
    options: GenerationOptions,
    ids: SpecialIds,
    memory_mask: Tensor | None = None,
    record: Recorder = record_cuda_graph,
) -> Generation:
    """What `search` over `model.step` would give, by replay; with the generator of an earlier call of this shape."""
    weights = tuple(weight.data_ptr() for weight in model.parameters())  # a graph reads them where they were
    shape = (memory.shape, memory.dtype, memory.device, options, memory_mask is None, weights, record)
    generator = _take(model, shape) or GraphedGenerator(model, memory, options, ids, memory_mask, record)
    found = generator.run(model, memory, memory_mask)
    with _lock:
        waiting = _idle.setdefault(model, [])
        waiting.append((shape, generator))
        del waiting[:-_KEPT]
    return found


def _take(model: Florence2Model, shape: Any) -> GraphedGenerator | None:
    with _lock:
        waiting = _idle.setdefault(model, [])
        for i, (known, generator) in enumerate(waiting):
            if known == shape:
                del waiting[i]
                return generator
    return None


def _with_own_buffers(state: SearchState) -> SearchState:
    copies: dict[str, Any] = {name: value.clone() for name, value in state.tensors().items()}
    return replace(state, **copies)


def _copy(source: SearchState, target: SearchState) -> None:
    """Every tensor of `source` into that of `target`, which stays where it is."""
    targets = target.tensors()
    for name, value in source.tensors().items():
        targets[name].copy_(value)
