"""`python -m benchmarks scaling`: how the cost of an answer grows with images, beams, tokens, image size and threads.

One process runs this project alone. Each line varies one quantity; the others stay at one image of the checkpoint's
own size, 3 beams and 32 tokens. A cost is the median of a few runs.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import florence2
from benchmarks.engines import synchronise
from benchmarks.machine import describe_machine
from benchmarks.subject import add_subject_options, default_image, load_subject
from florence2.pipeline import Florence2
from florence2.processor import Processor
from parity.report import format_rows

RESULTS = Path(__file__).parent / "SCALING.md"
TASK, TOKENS, BEAMS = "<CAPTION>", 32, 3


@dataclass(frozen=True)
class Point:
    """One measurement. `share` is the cost of one unit divided by the cost of one unit at the line's first point."""

    line: str
    value: int
    seconds: float
    unit_cost: float
    share: float


def main(arguments: list[str]) -> int:
    """Measure, print the table and write it."""
    options = _parser().parse_args(arguments)
    f = load_subject(options)
    points: list[Point] = []
    for point in _measure(f, options):
        points.append(point)
        print(f"{point.line} {point.value}: {point.seconds:.3g} s", file=sys.stderr)
    document = _document(points, options, arguments)
    print(document)
    if options.output:
        options.output.write_text(document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    add_subject_options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--beams", type=int, nargs="*", default=[1, 2, 3, 5, 10])
    parser.add_argument("--tokens", type=int, nargs="*", default=[10, 50, 100, 300, 1000])
    parser.add_argument("--sides", type=int, nargs="*", default=[384, 768, 1152, 1536])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--output", type=Path, help=f"also write the table, such as benchmarks/{RESULTS.name}")
    return parser


def _measure(f: Florence2, options: argparse.Namespace) -> Iterator[Point]:
    image = f.encode_image(default_image())

    def answer(images: int = 1, beams: int = BEAMS, tokens: int = TOKENS) -> Callable[[], object]:
        search = f.options(num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens - 1)
        return lambda: f.run_batch([(TASK, image)] * images, options=search, batch_size=images)

    ids = torch.tensor([f.processor.prompt(TASK)], device=f.model.device)
    with torch.no_grad():
        memory = f.model.encode(image.features, ids)

    def generate(tokens: int) -> Callable[[], object]:
        search = f.options(num_beams=BEAMS, max_new_tokens=tokens, min_new_tokens=tokens - 1)
        return lambda: florence2.generate(f.model, memory, search)

    yield from _line("images at once", options.images, lambda n: answer(images=n), options)
    yield from _line("beams", options.beams, lambda n: answer(beams=n), options)
    yield from _line("tokens", options.tokens, generate, options)
    yield from _line("pixels a side", options.sides, lambda side: _vision(f, side), options, unit=lambda n: n * n)
    before = torch.get_num_threads()
    for line, work in (("threads, vision", lambda: f.encode_image(default_image())), ("threads, answer", answer())):
        yield from _line(line, options.threads, partial(_with_threads, work), options, unit=_one)
    torch.set_num_threads(before)


def _line(
    name: str,
    values: list[int],
    make: Callable[[int], Callable[[], object]],
    options: argparse.Namespace,
    unit: Callable[[int], float] = float,
) -> Iterator[Point]:
    first = 0.0
    for value in values:
        work = make(value)
        seconds = _median(work, options)
        cost = seconds / unit(value)
        first = first or cost
        yield Point(name, value, seconds, cost, cost / first)


def _vision(f: Florence2, side: int) -> Callable[[], object]:
    processor = f.processor
    config = replace(processor.image_config, height=side, width=side)
    sized = Florence2(f.model, Processor(processor.tokenizer, config))
    image = default_image()
    return lambda: sized.encode_image(image)


def _with_threads(work: Callable[[], object], threads: int) -> Callable[[], object]:
    def run() -> None:
        torch.set_num_threads(threads)
        work()

    return run


def _one(_: int) -> float:
    return 1.0


def _median(work: Callable[[], object], options: argparse.Namespace) -> float:
    times = []
    work()
    for _ in range(options.repeats):
        synchronise(options.device)
        start = time.perf_counter()
        work()
        synchronise(options.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _document(points: list[Point], options: argparse.Namespace, arguments: list[str]) -> str:
    head = ["what grows", "value", "time", "time of one", "against the first"]
    body = [
        [p.line, str(p.value), f"{p.seconds:.3g} s", f"{1e3 * p.unit_cost:.3g} ms", f"{p.share:.2f}"]
        if p.line != "pixels a side"
        else [p.line, str(p.value), f"{p.seconds:.3g} s", f"{1e9 * p.unit_cost:.3g} ns a pixel", f"{p.share:.2f}"]
        for p in points
    ]
    weights = options.model or f"{options.preset}, synthetic weights"
    return f"""# Scaling

Generated by `python -m benchmarks scaling {shlex.join(arguments)}`: {weights},
{options.device}, {options.dtype}. {describe_machine()}.
Answers start from an encoded image and use {BEAMS} beams and {TOKENS} tokens unless the line varies them. The line
"tokens" starts from the memory. "Pixels a side" and "threads, vision" time the vision tower alone. "Against the first"
is the time of one unit (an image, a beam, a token, a pixel; the whole run for threads) divided by that of the line's
first row.

{format_rows(head, body)}
"""
