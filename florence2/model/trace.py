"""Naming intermediates on the line that computes them, for those who want to see or change them.

Model code calls `record(trace, name, value)` and goes on with what it returns. Without a trace that is the value
itself. With one, the trace may keep it, or return another tensor of the same shape in its place. Names are the
paths of the modules whose output they are (`vision_tower.blocks.2.4.spatial_block`), with a last part for what has
no module of its own (`decoder.layers.0.cross_attention.weights`); in the two text stacks attention goes by what it
looks at, `self_attention` and `cross_attention`. `florence2.tracing.names` lists them all.

A trace is passed down as an argument. For those who call a `Florence2`, which takes none, `TraceBlock` puts traces in
force for a block of one thread, and each call of the pipeline asks for its own with `start_trace`.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor


class Trace(Protocol):
    """What model code asks of a trace."""

    def wants(self, name: str) -> bool:
        """Whether `name` is worth computing where the fast path would not have it, as attention weights."""
        ...

    def enters(self, prefix: str) -> bool:
        """Whether anything below `prefix` is of interest; where nothing is, the fast paths are taken."""
        ...

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """Take note of `value`; return it, or what the run shall go on with."""
        ...

    def note(self, event: str, **facts: Any) -> None:
        """Hear what is no tensor: what a call was asked, and what it answers."""
        ...


class _Scoped:
    def __init__(self, trace: Trace, prefix: str):
        self.trace, self.prefix = trace, prefix

    def wants(self, name: str) -> bool:
        return self.trace.wants(f"{self.prefix}.{name}")

    def enters(self, prefix: str) -> bool:
        return self.trace.enters(f"{self.prefix}.{prefix}")

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return self.trace(f"{self.prefix}.{name}", value)

    def note(self, event: str, **facts: Any) -> None:
        self.trace.note(event, **facts)


class _Chain:
    """Several traces as one: each is given what the one before it returned."""

    def __init__(self, traces: list[Trace]):
        self.traces = traces

    def wants(self, name: str) -> bool:
        return any(trace.wants(name) for trace in self.traces)

    def enters(self, prefix: str) -> bool:
        return any(trace.enters(prefix) for trace in self.traces)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        for trace in self.traces:
            value = trace(name, value)
        return value

    def note(self, event: str, **facts: Any) -> None:
        for trace in self.traces:
            trace.note(event, **facts)


def record(trace: Trace | None, name: str, value: Tensor) -> Tensor:
    """Show `value` to the trace, if there is one."""
    return value if trace is None else trace(name, value)


def note(trace: Trace | None, event: str, **facts: Any) -> None:
    """Tell the trace, if there is one, what is no tensor."""
    if trace is not None:
        trace.note(event, **facts)


def scope(trace: Trace | None, prefix: str) -> Trace | None:
    """A trace that puts "prefix." before every name: what a module hands to its children. None if it would be idle."""
    return None if trace is None or not trace.enters(prefix) else _Scoped(trace, prefix)


class TraceBlock:
    """A block in which, and only in its thread or task, every call on `owner` is traced by what `start` makes for it.

    Blocks nest. Those that change values (`changes`) come first, the outer one before the inner, and those that only
    look see what the run goes on with. One object may be entered any number of times, by several threads at once too:
    it holds nothing, each thread and task knows for itself which blocks it is in.
    """

    def __init__(self, owner: object, start: Callable[[], Trace], changes: bool):
        self.owner, self.start, self.changes = owner, start, changes

    def __enter__(self) -> None:
        """Put the traces in force."""
        _entered.set((*_entered.get(), self))

    def __exit__(self, *_: object) -> None:
        """Take them out of force, whatever happened within."""
        entered = _entered.get()
        last = max(i for i, block in enumerate(entered) if block is self)
        _entered.set(entered[:last] + entered[last + 1 :])


_entered: ContextVar[tuple[TraceBlock, ...]] = ContextVar("florence2_traces", default=())


def start_trace(owner: object) -> Trace | None:
    """The trace of one call on `owner`, made for it alone; None outside of every block."""
    ours = [block for block in _entered.get() if block.owner is owner]
    traces = [block.start() for block in sorted(ours, key=lambda block: not block.changes)]
    return None if not traces else traces[0] if len(traces) == 1 else _Chain(traces)
