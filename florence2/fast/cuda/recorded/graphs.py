"""CUDA graphs: work that only touches fixed buffers is recorded once and replayed, as long as the model stays the same.

On a CUDA device a stage of the model is a few hundred small kernels, and starting them one by one from Python takes
longer than running them; a CUDA graph starts all with one call. A graph computes with the tensors that lay in their
places when it was recorded, and as the modules were then; `StageWatch` finds out whether both still hold.

On one H200 in float16, base took 0.85 ms a step (transformers 5.17: 13.1 ms), three beams, one image, with its steps
recorded for each shape; recorded, one image took 3.9 ms in place of 22.7, and its prompt 0.4 ms in place of 3.5.
"""

import contextlib
import operator
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from florence2.fast.unchanged import Kinds, find_change, find_mode, find_replaced_method, remember, structure
from florence2.model.bart import Attention, Decoder, DecoderLayer, Encoder, EncoderLayer, LanguageModel, Positions
from florence2.model.davit import (
    ChannelAttention,
    ChannelBlock,
    ConvEmbed,
    DaViT,
    DepthwiseConv,
    DualBlock,
    Mlp,
    SpatialBlock,
    WindowAttention,
)
from florence2.model.florence2 import Florence2Model, Head
from florence2.model.projection import CosineTable, PositionTable, Projection

Recorder = Callable[[Callable[[], None], torch.device], Callable[[], None]]
"""Take work that only touches fixed buffers of a device; return a call that does it again, with its `size` in bytes."""
Stage = TypeVar("Stage", bound="Recorded")

_KEPT = 64  # idle recordings of a model: rows times lengths of what is asked most
_KEPT_SHARE = 0.15  # of the device's memory, that they may hold
_KEPT_BYTES = 1 << 30  # the same on a device that does not say how much it has


@dataclass(frozen=True)
class Part:
    """A stage of the model: the modules that it computes with, and the methods of the model that it calls."""

    modules: tuple[str, ...]
    methods: tuple[str, ...]


VISION = Part(("vision_tower", "multi_modal_projector"), ("encode_image",))
ENCODER = Part(("language_model.encoder", "language_model.shared"), ("encode", "memory_mask"))
DECODER = Part(
    ("language_model.decoder", "language_model.shared", "lm_head"),
    ("step", "logits", "start_cache", "language_model.embed_answer"),
)

_MODELS = remember(frozenset((Florence2Model, LanguageModel)))
_kinds = remember(
    frozenset((DaViT, ConvEmbed, DualBlock, SpatialBlock, ChannelBlock, DepthwiseConv, Mlp))
    | frozenset((WindowAttention, ChannelAttention, Projection, PositionTable, CosineTable))
    | frozenset((Encoder, EncoderLayer, Decoder, DecoderLayer, Attention, Positions, Head))
    | frozenset((nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d, nn.ModuleList))
)


def know(kinds: Kinds) -> None:
    """Let modules of these classes be recorded too; call it when the module that knows them is imported.

    On a CUDA device they ask it for no value, and what they do depends on shapes and modules alone.
    """
    global _kinds
    _kinds = remember(_kinds | kinds)


def why_not_recorded(model: Florence2Model, part: Part = DECODER) -> str | None:
    """Return in words why a stage may do more than the modules of this package do; None if it does not."""
    text = model.language_model
    if part is not VISION and type(text) is not LanguageModel:
        return f"language_model is of the class {type(text).__name__}, which the faster way does not know"
    reason = _replaced_method(model, part)
    for path in part.modules:
        module = model.get_submodule(path) if path != "lm_head" else model.lm_head
        reason = reason or (None if module is None else find_change(module, _kinds, path) or _loose(module, path))
    return reason


def _replaced_method(model: Florence2Model, part: Part) -> str | None:
    own = (*vars(model), *(f"language_model.{name}" for name in vars(model.language_model)))
    replaced = next((name for name in part.methods if name in own), None)
    if replaced is not None:
        return f"the model has a replaced method, {replaced}"
    method = _replaced_class_method(model)
    return None if method is None else f"{method} was replaced"


def _replaced_class_method(model: Florence2Model) -> str | None:
    # sets that were remembered when their modules were imported: one that is new would be remembered now
    return find_replaced_method(_MODELS) or find_replaced_method(frozenset((type(model),)))


def _loose(module: nn.Module, path: str) -> str | None:
    """Return in words which tensor a graph would not look for, if there is any."""
    for name, part in module.named_modules():
        if any(isinstance(value, Tensor) for value in vars(part).values()):
            return f"{'.'.join(filter(None, (path, name)))} holds a tensor that is not a parameter"
    return None


class StageWatch:
    """What a stage of the model was when it was looked at, in detail and so that a change shows in a moment.

    Attributes:
        reason: Why the stage may not be recorded, in words; None if it may.
        key: The tensors' places and everything else that the stage computes with; None where it may not be recorded.
    """

    def __init__(self, model: Florence2Model, part: Part):
        self.part, self.reason = part, why_not_recorded(model, part)
        self.key: Hashable = None
        if self.reason is not None:
            return
        roots = [each for path in part.modules if (each := _find(model, path)) is not None]
        self._modules = [module for root in roots for module in root.modules()]
        self._tensors = [tensor for module in self._modules for tensor in _own_tensors(module)]
        self._tensors += [model.final_logits_bias]
        # held, so that nothing else can come to lie in the place of one of them
        self._values = self._read_values(model, part)
        self._places = self._read_places()
        self.key = self._places, tuple(structure(root) for root in roots)

    def holds(self, model: Florence2Model, part: Part) -> bool:
        """Return whether all is as it was; other values in the same tensors are not a change."""
        if find_mode() is not None or _hooked_globally():
            return False
        if find_replaced_method(_kinds) is not None or _replaced_class_method(model) is not None:
            return False
        values = self._read_values(model, part)
        same = len(values) == len(self._values) and all(map(operator.is_, values, self._values))
        return same and self._places == self._read_places()

    def is_like(self, other: "StageWatch") -> bool:
        """Return whether what was recorded under `other` is right under this."""
        return self is other or (self.reason is None and other.reason is None and self.key == other.key)

    def _read_values(self, model: Florence2Model, part: Part) -> list[object]:
        text = model.language_model
        values: list[object] = [type(model), type(text), model.final_logits_bias]
        values += [_find(model, path) for path in part.modules]
        values += [vars(owner).get(name) for name in _method_names(part) for owner in (model, text)]
        for module in self._modules:
            own = module.__dict__
            values += (type(module), *own.values(), *own["_parameters"].values(), *own["_buffers"].values())
            values += (*own["_modules"].values(), *own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
        return values

    def _read_places(self) -> tuple[object, ...]:
        return tuple((each.data_ptr(), each.shape, each.stride(), each.dtype) for each in self._tensors)


def _find(model: Florence2Model, path: str) -> nn.Module | None:
    module: Any = model
    for name in path.split("."):
        module = getattr(module, name)
    return module if isinstance(module, nn.Module) else None


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _method_names(part: Part) -> list[str]:
    return [name.rpartition(".")[2] for name in part.methods]


def _hooked_globally() -> bool:
    module = torch.nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


class Recorded:
    """Fixed buffers and the work on them, by kind: done plainly first, recorded the second time, then replayed."""

    def __init__(self, record: Recorder, device: torch.device):
        self._record, self._device = record, device
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._warm: dict[Hashable, int] = {}  # the thread that did the work last, plainly

    def do(self, kind: Hashable, work: Callable[[], None]) -> None:
        """Do work that is the same whenever it is of this kind."""
        replay = self._replays.get(kind) or self._try_to_record(kind, work)
        if replay is None:
            work()
            self._warm[kind] = threading.get_ident()
        else:
            replay()

    def _try_to_record(self, kind: Hashable, work: Callable[[], None]) -> Callable[[], None] | None:
        """Record work that this thread has done before; None where it has to be done plainly."""
        # libraries prepare themselves in each thread, and what happens once is not worth a recording
        if self._warm.get(kind) != threading.get_ident():
            return None
        try:
            with _recording:
                self._replays[kind] = self._record(work, self._device)
        except RecordingError as error:
            _give_up(error)
        return self._replays.get(kind)

    def forget(self) -> None:
        """Drop what was recorded; the model has changed."""
        self._replays, self._warm = {}, {}

    def tensors(self) -> Iterator[Tensor]:
        """Yield the buffers."""
        yield from ()

    @property
    def size(self) -> int:
        """The bytes of the buffers and of what was recorded."""
        buffers = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
        return buffers + sum(getattr(replay, "size", 0) for replay in self._replays.values())


_recording = threading.Lock()  # torch records one graph at a time


class CudaGraph:
    """A recorded CUDA graph; calling it does the work again."""

    def __init__(self, graph: torch.cuda.CUDAGraph, size: int):
        self._graph, self.size = graph, size

    def __call__(self) -> None:
        """Start the recorded kernels."""
        self._graph.replay()


class RecordingError(Exception):
    """Work that could not be recorded; it was not done, either."""


_failures: list[str] = []
"""Why recording was given up in this process: after a failed capture torch may not be able to make another."""


def why_given_up() -> str | None:
    """Return in words why nothing is recorded any more in this process; None while captures succeed."""
    return next(iter(_failures), None)


def _give_up(error: RecordingError) -> None:
    _failures.append(str(error))
    warnings.warn(f"CUDA graphs are not used any more in this process: {error}", RuntimeWarning, stacklevel=2)


def record_cuda_graph(work: Callable[[], None], device: torch.device) -> CudaGraph:
    """Capture `work` as a CUDA graph without running it. Raises RecordingError when that fails."""
    graph = torch.cuda.CUDAGraph()
    try:
        # always in the same mode: what torch keeps for all captures is made in that of the first
        with ordinary_tensors(), torch.cuda.device(device):
            # other threads may use the device meanwhile, for example to upload the next images
            with torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved(device)
                work()
            return CudaGraph(graph, max(0, torch.cuda.memory_reserved(device) - before))
    except RuntimeError as error:
        raise RecordingError(f"a capture failed ({str(error).splitlines()[0]})") from error


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of captures, because libraries keep room for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Recordings:
    """The idle recordings of one model, those that were used last at the end; each serves one call at a time."""

    def __init__(self) -> None:
        self._idle: OrderedDict[int, tuple[Hashable, Recorded, int]] = OrderedDict()
        self._lock, self._given = threading.Lock(), 0
        self.watches: dict[Part, StageWatch] = {}

    def take(self, key: Hashable, make: Callable[[], Stage]) -> Stage:
        """Return the recording that was made for `key` and used last, or a new one; no other call has it."""
        with self._lock:
            place = next((place for place, (known, *_) in reversed(self._idle.items()) if known == key), None)
            if place is not None:
                stage: Any = self._idle.pop(place)[1]
                return stage  # type: ignore[no-any-return]
        with ordinary_tensors():
            try:
                return make()
            except torch.OutOfMemoryError:
                self.clear()  # they are only kept for speed
                return make()

    def give(self, key: Hashable, stage: Recorded, device: torch.device) -> None:
        """Keep a recording for later calls, in the place of those that were not used for longest."""
        with self._lock:
            self._given += 1
            self._idle[self._given] = key, stage, stage.size
            total, limit = sum(size for *_, size in self._idle.values()), kept_bytes(device)
            # the newest stays, however large: without it every call would record again
            while len(self._idle) > 1 and (len(self._idle) > _KEPT or total > limit):
                _, (_, _, size) = self._idle.popitem(last=False)
                total -= size

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._idle.clear()

    @property
    def size(self) -> int:
        """The bytes of all that is idle."""
        with self._lock:
            return sum(size for *_, size in self._idle.values())

    def __len__(self) -> int:
        """Count the idle recordings."""
        return len(self._idle)


def kept_bytes(device: torch.device) -> int:
    """Return how many bytes the idle recordings of one model may hold."""
    if device.type != "cuda":
        return _KEPT_BYTES
    return int(_KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory)


_models: "weakref.WeakKeyDictionary[Florence2Model, Recordings]" = weakref.WeakKeyDictionary()
_models_lock = threading.Lock()


def recordings(model: Florence2Model) -> Recordings:
    """Return the recordings of a model, which last as long as it does."""
    with _models_lock:
        return _models.setdefault(model, Recordings())


def watch(model: Florence2Model, part: Part) -> StageWatch:
    """Return what a stage of the model is now; the same object as before while nothing changes."""
    kept = recordings(model).watches
    known = kept.get(part)
    if known is None or known.reason is not None or not known.holds(model, part):
        known = kept[part] = StageWatch(model, part)
    return known


_recorder: ContextVar[Recorder | None] = ContextVar("florence2_recorder", default=record_cuda_graph)


@contextlib.contextmanager
def record_with(recorder: Recorder | None) -> Iterator[None]:
    """Let `recorder` record inside the block, on any device, for tests and comparisons; None records nothing."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def recorder_for(device: torch.device) -> Recorder | None:
    """Return how work on a device is recorded; None where it is not."""
    if torch.compiler.is_compiling():  # which cannot read a context variable
        return None
    recorder = _recorder.get()
    impossible = recorder is record_cuda_graph and (device.type != "cuda" or why_given_up() is not None)
    return None if impossible else recorder


def stream_of(device: torch.device) -> int:
    """Return which stream the current thread's work on a device goes to: two streams may not share buffers."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that may be written to in and out of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def round_up(value: int, steps: Sequence[int]) -> int:
    """Return the first of the ascending `steps` that is at least `value`; above them, a multiple of the last."""
    return next((step for step in steps if step >= value), -(-value // steps[-1]) * steps[-1])
