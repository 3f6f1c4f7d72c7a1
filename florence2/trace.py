"""Naming intermediates on the line that computes them, for those who want to see or change them.

Model code calls `record(trace, name, value)` and goes on with what it returns. Without a trace that is the value
itself. With one, the trace may keep it, or return another tensor of the same shape in its place. Names are the
paths of the modules whose output they are (`vision_tower.blocks.2.4.spatial_block`), with a last part for what has
no module of its own (`decoder.layers.0.encoder_attn.weights`).
"""

from typing import Protocol

from torch import Tensor


class Trace(Protocol):
    """What model code asks of a trace."""

    def wants(self, name: str) -> bool:
        """Whether `name` is worth computing where the fast path would not have it, as attention weights."""
        ...

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """Take note of `value`; return it, or what the run shall go on with."""
        ...


class _Scoped:
    def __init__(self, trace: Trace, prefix: str):
        self.trace, self.prefix = trace, prefix

    def wants(self, name: str) -> bool:
        return self.trace.wants(f"{self.prefix}.{name}")

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return self.trace(f"{self.prefix}.{name}", value)


def record(trace: Trace | None, name: str, value: Tensor) -> Tensor:
    """Show `value` to the trace, if there is one."""
    return value if trace is None else trace(name, value)


def scope(trace: Trace | None, prefix: str) -> Trace | None:
    """A trace that puts "prefix." before every name: what a module hands to its children."""
    return None if trace is None else _Scoped(trace, prefix)
