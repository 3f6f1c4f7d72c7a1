"""Naming intermediates on the line that computes them, for those who want to see or change them.

Model code calls `x = trace(name, x)` and continues with what it gets back. `NO_TRACE`, the default, returns the value
itself; other traces may keep it, or return another tensor of the same shape in its place. Names are the paths of the
modules whose output they are (`vision_tower.blocks.2.4.spatial_block`), with a last part for values that belong to no
module of their own (`decoder.layers.0.cross_attention.weights`); in the text stacks attention is named after what it
looks at, `self_attention` or `cross_attention`. `florence2.tracing.names` lists all names.

A trace is an argument. Users of a `Florence2` pass none: a `TraceBlock` puts traces in force inside a `with` block of
one thread, and each call of the pipeline asks for its own with `start_trace`.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor


class Trace:
    """What model code shows its intermediates to. This one wants none of them."""

    def wants(self, name: str) -> bool:  # noqa: ARG002
        """Return whether to compute `name` where the faster way would not have it, as with attention weights."""
        return False

    def enters(self, prefix: str) -> bool:  # noqa: ARG002
        """Return whether any name below `prefix` is of interest."""
        return False

    def __call__(self, name: str, value: Tensor) -> Tensor:  # noqa: ARG002
        """Look at `value` and return it, or the tensor that the run should continue with."""
        return value

    def at(self, prefix: str) -> "Trace":
        """Return the trace to hand to a child module: it puts "prefix." before every name."""
        return _Scoped(self, prefix) if self.enters(prefix) else NO_TRACE

    def image_started(self, shape: Sequence[int]) -> None:
        """Receive the `shape` (B, 3, H, W) of pixel values before they are encoded."""

    def image_done(self, images: Sequence[Any]) -> None:
        """Receive the encoded images of this call."""

    def answer_started(self, images: Sequence[Any], prompts: Sequence[Sequence[int]], options: Any) -> None:
        """Receive the requests of a batch, encoded images, prompt ids and settings, before they are answered."""

    def answer_done(self, answers: Sequence[Any]) -> None:
        """Receive the answers of the batch."""


NO_TRACE = Trace()


class _Scoped(Trace):
    def __init__(self, trace: Trace, prefix: str):
        self.trace, self.prefix = trace, prefix

    def wants(self, name: str) -> bool:
        return self.trace.wants(f"{self.prefix}.{name}")

    def enters(self, prefix: str) -> bool:
        return self.trace.enters(f"{self.prefix}.{prefix}")

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return self.trace(f"{self.prefix}.{name}", value)


class _Chain(Trace):
    """Several traces as one: each is given what the one before it returned."""

    def __init__(self, traces: Sequence[Trace]):
        self.traces = traces

    def wants(self, name: str) -> bool:
        return any(trace.wants(name) for trace in self.traces)

    def enters(self, prefix: str) -> bool:
        return any(trace.enters(prefix) for trace in self.traces)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        for trace in self.traces:
            value = trace(name, value)
        return value

    def image_started(self, shape: Sequence[int]) -> None:
        for trace in self.traces:
            trace.image_started(shape)

    def image_done(self, images: Sequence[Any]) -> None:
        for trace in self.traces:
            trace.image_done(images)

    def answer_started(self, images: Sequence[Any], prompts: Sequence[Sequence[int]], options: Any) -> None:
        for trace in self.traces:
            trace.answer_started(images, prompts, options)

    def answer_done(self, answers: Sequence[Any]) -> None:
        for trace in self.traces:
            trace.answer_done(answers)


class TraceBlock:
    """Context manager: inside it, and only in the current thread or task, each call on `owner` gets a fresh trace.

    Blocks nest. Patches, which change values, see a value before observers do, the outer block before the inner one.
    One block may be entered any number of times, by several threads at once too: each thread and task knows for itself
    which blocks it is in.
    """

    def __init__(self, owner: object, start: Callable[[], Trace], patches: bool):
        self.owner, self.start, self.patches = owner, start, patches

    def __enter__(self) -> None:
        """Put the traces in force."""
        _entered.set((*_entered.get(), self))

    def __exit__(self, *_: object) -> None:
        """Remove them again, whatever happened inside."""
        entered = _entered.get()
        last = max(i for i, block in enumerate(entered) if block is self)
        _entered.set(entered[:last] + entered[last + 1 :])


_entered: ContextVar[tuple[TraceBlock, ...]] = ContextVar("florence2_traces", default=())


def start_trace(owner: object, observe: bool = True) -> Trace:
    """Return a new trace for one call on `owner`; outside of every block that is `NO_TRACE`.

    Without `observe`, patches act and nothing is recorded.
    """
    blocks = [block for block in _entered.get() if block.owner is owner and (observe or block.patches)]
    if not blocks:
        return NO_TRACE
    patches = [block.start() for block in blocks if block.patches]
    observers = [block.start() for block in blocks if not block.patches]
    traces = [*patches, *observers]
    return traces[0] if len(traces) == 1 else _Chain(traces)
