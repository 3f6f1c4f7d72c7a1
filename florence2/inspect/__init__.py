"""Opening the model up: see what a run computed, and change it.

`trace` keeps named values of a run (`f.trace(...)`), `patched` changes them (`f.patched({...})`). What can be named
is in `florence2.inspect.names`. `sweep_heads` and `sweep_blocks` switch parts off one by one, `trace_causes` moves
values from one run to another, `fit_probe` reads something out of a value over many pictures; the first two measure
how probable an answer stays, as `force` and `answer_logprobs` do.
"""

from florence2.inspect.beams import Ban, BeamStep, Candidate
from florence2.inspect.causes import Cause, Causes, trace_causes
from florence2.inspect.forced import Case, answer_logprobs, answer_scores, force, likeliest_bins
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
from florence2.inspect.probe import Probe, fit_probe
from florence2.inspect.regions import box_iou, cells_in, coverage, image_cells
from florence2.inspect.runs import Run, TracedPicture
from florence2.inspect.sweep import Ablation, Sweep, sweep_blocks, sweep_heads
from florence2.inspect.tracing import Tracing, trace

__all__ = [
    "Ablation",
    "Ban",
    "BeamStep",
    "Candidate",
    "Case",
    "Cause",
    "Causes",
    "Name",
    "Patch",
    "Probe",
    "Run",
    "Sweep",
    "TracedPicture",
    "Tracing",
    "answer_logprobs",
    "answer_scores",
    "at",
    "box_iou",
    "cells_in",
    "coverage",
    "describe_names",
    "fit_probe",
    "force",
    "from_run",
    "image_cells",
    "likeliest_bins",
    "names_of",
    "patched",
    "replace",
    "scale",
    "scale_heads",
    "select",
    "sweep_blocks",
    "sweep_heads",
    "trace",
    "trace_causes",
    "zero",
    "zero_heads",
]
