"""Look inside the model: see what a run computed, and change it.

`f.trace(...)` keeps named values of a run, `f.patched({...})` changes them; `describe_names` lists the names,
`patches` makes the changes. `explain` collects everything about one answer, from
functions that work on any traced run: `attention_maps`, `attention_rollout`, `logit_lens`, `input_saliency`.
`ablate_heads` and `ablate_blocks` switch parts off one at a time, `causal_tracing` moves values from one run into
another, and `fit_probe` reads something out of a value over many images. The first three measure how probable an answer
stays, which `teacher_force`, `answer_scores` and `answer_logprobs` do for experiments of your own.

Everything else is imported from its own module, such as `florence2.inspect.regions` and `florence2.inspect.plots`.
"""

from typing import TYPE_CHECKING

__all__ = [
    "AttentionMaps",
    "CausalEffects",
    "Explanation",
    "ForcedAnswer",
    "LogitLens",
    "Probe",
    "Saliency",
    "Sweep",
    "Tracing",
    "ablate_blocks",
    "ablate_heads",
    "answer_logprobs",
    "answer_scores",
    "attention_maps",
    "attention_rollout",
    "causal_tracing",
    "describe_names",
    "explain",
    "fit_probe",
    "input_saliency",
    "logit_lens",
    "patched",
    "patches",
    "teacher_force",
    "trace",
]

if TYPE_CHECKING:
    from florence2.inspect.ablation import Sweep
    from florence2.inspect.attention import AttentionMaps, attention_maps
    from florence2.inspect.causal import CausalEffects, causal_tracing
    from florence2.inspect.explanation import Explanation, explain
    from florence2.inspect.lens import LogitLens, logit_lens
    from florence2.inspect.probe import Probe, fit_probe
    from florence2.inspect.rollout import attention_rollout
    from florence2.inspect.saliency import Saliency, input_saliency
    from florence2.inspect.sweep import ablate_blocks, ablate_heads
    from florence2.inspect.teacher_forcing import ForcedAnswer, answer_logprobs, answer_scores, teacher_force
    from florence2.tracing import patches
    from florence2.tracing.names import describe_names
    from florence2.tracing.patches import patched
    from florence2.tracing.recording import Tracing, trace
else:
    from florence2.lazy import lazy_names

    # the help of `florence2 inspect` and `florence2 audit` needs no torch
    __getattr__ = lazy_names(
        __name__,
        {
            "florence2.inspect.ablation": ("Sweep",),
            "florence2.inspect.attention": (
                "AttentionMaps",
                "attention_maps",
            ),
            "florence2.inspect.causal": (
                "CausalEffects",
                "causal_tracing",
            ),
            "florence2.inspect.explanation": (
                "Explanation",
                "explain",
            ),
            "florence2.inspect.lens": (
                "LogitLens",
                "logit_lens",
            ),
            "florence2.inspect.probe": (
                "Probe",
                "fit_probe",
            ),
            "florence2.inspect.rollout": ("attention_rollout",),
            "florence2.inspect.saliency": (
                "Saliency",
                "input_saliency",
            ),
            "florence2.inspect.sweep": (
                "ablate_blocks",
                "ablate_heads",
            ),
            "florence2.inspect.teacher_forcing": (
                "ForcedAnswer",
                "answer_logprobs",
                "answer_scores",
                "teacher_force",
            ),
            "florence2.tracing": ("patches",),
            "florence2.tracing.names": ("describe_names",),
            "florence2.tracing.patches": ("patched",),
            "florence2.tracing.recording": (
                "Tracing",
                "trace",
            ),
        },
    )


def __dir__() -> list[str]:
    """List the public names as well, imported or not."""
    return sorted({*globals(), *__all__})
