"""Opening the model up: see what a run computed, and change it.

`trace` keeps named values of a run (`f.trace(...)`), `patched` changes them (`f.patched({...})`). What can be named
is in `florence2.inspect.names`.
"""

from florence2.inspect.beams import Ban, BeamStep, Candidate
from florence2.inspect.names import Name, describe_names, names_of, select
from florence2.inspect.patching import (
    Patch,
    at,
    from_run,
    patched,
    replace,
    scale,
    scale_heads,
    zero,
    zero_heads,
)
from florence2.inspect.runs import Run, TracedPicture
from florence2.inspect.tracing import Tracing, trace

__all__ = [
    "Ban",
    "BeamStep",
    "Candidate",
    "Name",
    "Patch",
    "Run",
    "TracedPicture",
    "Tracing",
    "at",
    "describe_names",
    "from_run",
    "names_of",
    "patched",
    "replace",
    "scale",
    "scale_heads",
    "select",
    "trace",
    "zero",
    "zero_heads",
]
