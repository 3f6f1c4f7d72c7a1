"""Generation by replay: a step is recorded once as a CUDA graph, over buffers that never move, and then repeated.

On a CUDA device a step of the decoder is a few hundred small kernels, and starting them one by one from Python takes
longer than running them; a CUDA graph starts all with one call. Nothing in a step asks the host: the search is
`SearchState.advance`, the cache keeps its position on the device, and the flag that says that all inputs are done is
read two steps late. The plain counterpart is `generation.search` over `Florence2Model.step`.

On one H200 in float16, base took 0.85 ms a step (transformers 5.17: 13.1 ms), three beams, one image.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from florence2.fast.cuda.layers import FusedDecoderLayer
from florence2.fast.cuda.search import fuse
from florence2.fast.decoder import DirectDecoder
from florence2.fast.linear import Linear
from florence2.fast.unchanged import find_change, find_replaced_method, remember, structure
from florence2.generation.options import GenerationOptions
from florence2.generation.search import start_search
from florence2.generation.state import Generation, SearchState, SpecialIds, logit_rules
from florence2.model.bart import (
    POSITION_OFFSET,
    Attention,
    Decoder,
    DecoderLayer,
    LanguageModel,
    Positions,
)
from florence2.model.cache import DecoderCache, KeysValues
from florence2.model.florence2 import Florence2Model, Head

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Take work that only touches fixed buffers; return a call that does it again."""

_FIRST_WINDOW = 64  # positions; each next window is twice as long, so that short answers do not attend to empty slots
_LATE = 2  # steps between copying the flag that all inputs are done and reading it
_KEPT = 2  # idle generators for each model, waiting for a call of their shape


class StaticCache(DecoderCache):
    """A cache whose buffers never move and whose position is a tensor, so that a recorded step can be replayed."""

    def __init__(
        self, decoder: Decoder, memory: Tensor, beams: int, max_length: int, memory_mask: Tensor | None = None
    ):
        super().__init__(decoder, memory, beams, max_length, memory_mask)
        self.position = torch.zeros(1, dtype=torch.long, device=memory.device)
        self.slots = torch.arange(beams, device=memory.device)
        self.window = max_length
        """How many positions a step looks at; all later ones must be empty."""

    def restart(self, decoder: Decoder, memory: Tensor, memory_mask: Tensor | None) -> None:
        """Forget everything, and take another memory of the same shape."""
        fresh = DecoderCache(decoder, memory, self.beams, 0, memory_mask)
        for old, new in zip(self.projected, fresh.projected, strict=True):
            for kept, taken in zip(old[:3], new[:3], strict=True):
                if kept is not None and taken is not None:
                    kept.copy_(taken)
        self.ancestry.zero_()
        self.position.zero_()

    def embed_position(self, table: nn.Module) -> Tensor:
        """Return the embedding (1, D) of the position that `advance` opens next."""
        assert isinstance(table, Positions)
        return table.weight.index_select(0, self.position + POSITION_OFFSET)

    def advance(self) -> None:
        """Open the next position."""
        own = torch.eye(self.beams, dtype=torch.bool, device=self.ancestry.device).expand(len(self.ancestry), -1, -1)
        self.slots.copy_(self.position * self.beams + torch.arange(self.beams, device=self.slots.device))
        self.ancestry.index_copy_(2, self.slots, own)
        self.position.add_(1)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Write the newest position; later slots are attended to with weight 0, so they must not hold NaN."""
        pair = self.own[layer] or (self._room_for(keys).zero_(), self._room_for(values).zero_())
        self.own[layer] = pair
        for buffer, new in zip(pair, (keys, values), strict=True):
            buffer.index_copy_(2, self.slots, new)
        end = self.window * self.beams
        return KeysValues(pair[0][:, :, :end], pair[1][:, :, :end], self.ancestry[:, None, :, :end])

    def reorder(self, parents: Tensor) -> None:
        """Let beam k continue beam `parents[b, k]`."""
        self.ancestry.copy_(self.ancestry.gather(1, parents[:, :, None].expand_as(self.ancestry)))


class GraphedGenerator:
    """The buffers of generations of one shape, and their recorded steps. It serves one call at a time."""

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
        self.empty = fuse(start_search(len(memory), options, ids, memory.device))
        self.state = _with_own_buffers(self.empty)
        self.all_done = torch.zeros(1, dtype=torch.bool, device=memory.device)
        self.recorded: dict[Any, Callable[[], None] | None] = {}

    def run(self, model: Florence2Model, memory: Tensor, memory_mask: Tensor | None) -> Generation:
        """Answer `memory`, whose shape must be the one that this was made for."""
        self.cache.restart(model.language_model.decoder, memory, memory_mask)
        _copy(self.empty, self.state)
        flags = _LateFlags(self.all_done)
        for n in range(1, self.options.max_new_tokens + 1):
            self._step(model, n)
            if flags.ask():
                break
        return _with_own_buffers(self.state).finish()

    def _step(self, model: Florence2Model, n: int) -> None:
        """Run the n-th step: plainly when its kind occurs first, recorded the second time, then replayed."""
        window = _FIRST_WINDOW
        while window < n:
            window *= 2
        self.cache.window = min(window, self.options.max_new_tokens)
        rules = logit_rules(self.options, self.state.ids)
        kind = (self.cache.window, *(rule.applies(n - 1) for rule in rules))

        def work() -> None:
            logits = model.step(self.state.newest.flatten(), self.cache).float()  # as the plain search
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
        """Return the flag as it was `_LATE` steps ago; on a CPU, as it is now."""
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
    """Capture `work` as a CUDA graph without running it; return its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


_lock = threading.Lock()
_idle: "weakref.WeakKeyDictionary[Florence2Model, list[tuple[Any, GraphedGenerator]]]" = weakref.WeakKeyDictionary()


_KINDS = remember(
    frozenset(
        (
            *(Decoder, DirectDecoder, DecoderLayer, FusedDecoderLayer, Attention, Positions),
            *(Linear, nn.LayerNorm, nn.ModuleList, nn.Embedding),
        )
    )
)
_EMBEDDING = remember(frozenset((nn.Embedding,)))
_MODELS = remember(frozenset((Florence2Model, LanguageModel, Head)))


def generate_graphed(
    model: Florence2Model,
    memory: Tensor,
    options: GenerationOptions,
    ids: SpecialIds,
    memory_mask: Tensor | None = None,
    record: Recorder | None = None,
) -> Generation | None:
    """Return what `search` over `model.step` gives, by replay; None where a step may not be recorded.

    `record` None is a CUDA graph, for a memory on a CUDA device only. The generator of an earlier call with the same
    shapes, options and structure is used again.
    """
    if (record is None and memory.device.type != "cuda") or why_not_recorded(model) is not None:
        return None
    if options.extra_rules or options.sample:
        return None  # a rule of one's own may look at values; draws would be those of the call that was recorded
    record = record or record_cuda_graph
    # a graph reads tensors where they were when it was recorded, and all else as it was then
    tensors = (*model.parameters(), *model.buffers())
    places = tuple((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
    key = (
        (memory.shape, memory.dtype, memory.device, options, memory_mask is None, record),
        (places, structure(model.language_model)),
    )
    generator = _take(model, key) or GraphedGenerator(model, memory, options, ids, memory_mask, record)
    found = generator.run(model, memory, memory_mask)
    with _lock:
        waiting = _idle.setdefault(model, [])
        waiting.append((key, generator))
        del waiting[:-_KEPT]
    return found


def why_not_recorded(model: Florence2Model) -> str | None:
    """Return in words why a step may do more than the modules of this package do; None if it does not."""
    text = model.language_model
    if type(text) is not LanguageModel:
        return f"language_model is of the class {type(text).__name__}, which the faster way does not know"
    own = (*vars(model), *(f"language_model.{name}" for name in vars(text)))
    replaced = [name for name in ("step", "logits", "start_cache", "language_model.embed_answer") if name in own]
    if replaced:
        return f"the model has a replaced method, {replaced[0]}"
    change = find_change(text.decoder, _KINDS, "language_model.decoder")
    change = change or find_change(text.shared, _EMBEDDING, "language_model.shared")
    change = change or find_replaced_method(_MODELS | {type(model)})
    if change is None and model.lm_head is not None and type(model.lm_head) is not Head:
        return f"lm_head is of the class {type(model.lm_head).__name__}, which the faster way does not know"
    loose = (name for name, part in text.named_modules() if any(isinstance(v, Tensor) for v in vars(part).values()))
    return change or next((f"language_model.{name} holds a tensor that is not a parameter" for name in loose), None)


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
    """Copy every tensor of `source` into that of `target`, which stays where it is."""
    targets = target.tensors()
    for name, value in source.tensors().items():
        targets[name].copy_(value)
