"""Opening the model up: see what a run computed, and change it.

`trace` keeps named values of a run (`f.trace(...)`), `patched` changes them (`f.patched({...})`). What can be named
is in `florence2.tracing.names`. `explain` says why an answer is what it is, from the functions that do so for any
traced run: `map_attention`, `roll_out`, `read_lens`, `find_saliency`. `sweep_heads` and `sweep_blocks` switch parts off
one by one, `trace_causes` moves values from one run to another, `fit_probe` reads something out of a value over many
pictures; the first three measure how probable an answer stays, as `force` and `answer_logprobs` do.
"""

from florence2.inspect.attention_maps import AttentionMaps, map_attention, spread_over
from florence2.inspect.causes import Cause, Causes, trace_causes
from florence2.inspect.explanation import (
    Alternative,
    ExplainedToken,
    Explanation,
    Piece,
    Region,
    Spread,
    explain,
    explain_run,
)
from florence2.inspect.forced import Case, answer_logprobs, answer_scores, force, likeliest_bins
from florence2.inspect.lens import LogitLens, project, read_lens
from florence2.inspect.probe import Probe, fit_probe
from florence2.inspect.regions import box_iou, cells_in, coverage, image_cells
from florence2.inspect.rollout import roll_out, roll_out_decoder, roll_out_encoder
from florence2.inspect.saliency import Saliency, find_saliency, saliency_of
from florence2.inspect.sweep import Ablation, Sweep, sweep_blocks, sweep_heads
from florence2.tracing.beams import Ban, BeamStep, Candidate
from florence2.tracing.names import Name, describe_names, names_of, select
from florence2.tracing.patches import (
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
from florence2.tracing.recording import Tracing, trace
from florence2.tracing.runs import Run, TracedPicture

__all__ = [
    "Ablation",
    "Alternative",
    "AttentionMaps",
    "Ban",
    "BeamStep",
    "Candidate",
    "Case",
    "Cause",
    "Causes",
    "ExplainedToken",
    "Explanation",
    "LogitLens",
    "Name",
    "Patch",
    "Piece",
    "Probe",
    "Region",
    "Run",
    "Saliency",
    "Spread",
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
    "explain",
    "explain_run",
    "find_saliency",
    "fit_probe",
    "force",
    "from_run",
    "image_cells",
    "likeliest_bins",
    "map_attention",
    "names_of",
    "patched",
    "project",
    "read_lens",
    "replace",
    "roll_out",
    "roll_out_decoder",
    "roll_out_encoder",
    "saliency_of",
    "scale",
    "scale_heads",
    "select",
    "spread_over",
    "sweep_blocks",
    "sweep_heads",
    "trace",
    "trace_causes",
    "zero",
    "zero_heads",
]
