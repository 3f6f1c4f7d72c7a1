"""`python -m benchmarks traces`: the cost of a trace, and of the model's trace points when no trace is active.

One process. Every round answers twice without a trace and once with each group of names, so drifting machine speed
affects all groups alike; the second run without a trace shows the noise. The answer starts from an encoded image and
has exactly `--tokens` tokens, whatever the model's own end.
"""

import argparse
import shlex
import statistics
import sys
import time
import timeit
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.engines import synchronise
from benchmarks.machine import describe_machine
from benchmarks.scaling import TASK
from benchmarks.subject import add_subject_options, default_image, load_subject
from florence2.errors import Florence2Error
from florence2.generation.options import GenerationOptions
from florence2.inspect import trace
from florence2.model.trace import NO_TRACE, Trace
from florence2.pipeline import EncodedImage, Florence2
from parity.report import format_rows

WEIGHTS = "decoder.layers.*.cross_attention.weights"
GROUPS: dict[str, Sequence[str] | None] = {
    "no trace": None,
    "no trace, again": None,
    "cross-attention weights": (WEIGHTS,),
    "all of the cross-attentions": ("decoder.layers.*.cross_attention",),
    "the names that `explain` keeps": (
        WEIGHTS,
        "encoder.layers.*.self_attention.weights",
        "=decoder.layers.*",
        "=scores",
    ),
}


@dataclass
class Cost:
    """One group: seconds by round, the largest growth of memory in a round, and the bytes that the trace holds."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    held: int = 0


class _Counter(Trace):
    """A trace that accepts every value and keeps none: counts the trace points of a step."""

    def __init__(self) -> None:
        self.records = self.scopes = 0

    def wants(self, name: str) -> bool:  # noqa: ARG002
        return False

    def enters(self, prefix: str) -> bool:  # noqa: ARG002
        self.scopes += 1
        return True

    def __call__(self, name: str, value: Tensor) -> Tensor:  # noqa: ARG002
        self.records += 1
        return value


def main(arguments: list[str]) -> int:
    """Measure, print the table and write it; return 1 when a trace changed the tokens."""
    options = _parser().parse_args(arguments)
    f = load_subject(options)
    image = f.encode_image(default_image())
    search = f.options(num_beams=options.beams, max_new_tokens=options.tokens, min_new_tokens=options.tokens - 1)
    costs = {name: Cost() for name in GROUPS}
    answers = {_answer(f, image, search, None)[0]}  # the first answer also packs the weights
    for round_index in range(options.rounds):
        for name, patterns in GROUPS.items():
            answers.add(_measure(f, image, search, patterns, costs[name]))
            print(f"round {round_index + 1}, {name}: {costs[name].seconds[-1]:.3g} s", file=sys.stderr)
    document = _document(options, arguments, costs, _idle_cost(f, image), same=len(answers) == 1)
    print(document)
    if options.output:
        options.output.write_text(document)
    return 0 if len(answers) == 1 else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks traces", description=__doc__)
    add_subject_options(parser)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the table")
    return parser


def _answer(
    f: Florence2, image: EncodedImage, search: GenerationOptions, patterns: Sequence[str] | None
) -> tuple[tuple[int, ...], int]:
    """Return the ids of one answer, and how many bytes its trace holds."""
    with nullcontext() if patterns is None else trace(f, *patterns, limit=1 << 40) as t:
        ids = f.run(TASK, image, options=search).token_ids
    return ids, 0 if t is None else t.bytes


def _measure(
    f: Florence2, image: EncodedImage, search: GenerationOptions, patterns: Sequence[str] | None, cost: Cost
) -> tuple[int, ...]:
    """Time one answer and return its ids."""
    before = _start_watching(f)
    start = time.perf_counter()
    ids, held = _answer(f, image, search, patterns)
    synchronise(f.model.device.type)
    cost.seconds.append(time.perf_counter() - start)
    cost.peak = max(cost.peak, _read_peak(f) - before)
    cost.held = held
    return ids


def _start_watching(f: Florence2) -> int:
    """Reset the peak and return the bytes in use."""
    if f.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        raise Florence2Error("Peak memory can be measured only on Linux or with --device cuda.")
    forget.write_text("5")  # resets the peak to the current value
    return _status("VmRSS")


def _read_peak(f: Florence2) -> int:
    return torch.cuda.max_memory_allocated() if f.model.device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _idle_cost(f: Florence2, image: EncodedImage) -> str:
    """Estimate what a step's trace points cost without a trace: their number times the time of one."""
    counter = _Counter()
    ids = torch.zeros(3, dtype=torch.long, device=f.model.device)
    with torch.inference_mode():
        memory = f.model.encode(image.features, torch.tensor([f.processor.prompt(TASK)], device=f.model.device))
        step = f.model.step
        step(ids, f.model.start_cache(memory, 3, 2), counter)
        cache, times = f.model.start_cache(memory, 3, 20), []
        for _ in range(15):
            start = time.perf_counter()
            step(ids, cache)
            synchronise(f.model.device.type)
            times.append(time.perf_counter() - start)
    calls, value = 100_000, ids
    one = timeit.timeit(lambda: NO_TRACE("name", value), number=calls) / calls
    two = timeit.timeit(lambda: NO_TRACE.at(f"layers.{calls}"), number=calls) / calls
    idle, whole = counter.records * one + counter.scopes * two, statistics.median(times)
    return (
        f"Without a trace, the {counter.records} values and {counter.scopes} scopes of a step cost "
        f"{1e6 * idle:.0f} µs, {idle / whole:.2%} of a step of {1e3 * whole:.3g} ms."
    )


def _document(options: argparse.Namespace, arguments: list[str], costs: dict[str, Cost], idle: str, same: bool) -> str:
    plain = costs["no trace"]
    body = []
    for name, cost in costs.items():
        low, middle, high = (
            f"{v:.3g}" for v in (min(cost.seconds), statistics.median(cost.seconds), max(cost.seconds))
        )
        ratio = statistics.median(a / b for a, b in zip(cost.seconds, plain.seconds, strict=True))
        sizes = [f"{(cost.peak - plain.peak) / 1e6:.0f} MB", f"{cost.held / 1e6:.1f} MB"]
        body.append([name, f"{middle} s ({low}–{high})", f"{ratio:.2f}", *sizes])
    head = ["kept", "an answer", "against no trace", "more memory at its peak", "held"]
    words = [word for word in arguments if word != str(options.output)]
    weights = options.model or f"{options.preset}, synthetic weights"
    verdict = "All answers have the same tokens." if same else "**Tokens differ.**"
    return f"""# What traces cost

Generated by `python -m benchmarks traces {shlex.join(words)}`: {weights},
{options.device}, {options.dtype}, {options.beams} beams, {options.tokens} tokens from an encoded image.
{describe_machine()}. Medians of {options.rounds} rounds, range in brackets; ratios are taken within a round.

{verdict} {idle}

{format_rows(head, body)}
"""
