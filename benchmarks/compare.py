"""`python -m benchmarks compare OLD NEW`: two checkouts of this project on one checkpoint, in turns.

Every round runs both checkouts, each in a fresh process with the same clocks (see `compare_worker.py`). A ratio is
taken within a round, because a machine's speed drifts; the table shows the median over the rounds. Times count only
when both checkouts gave the same tokens in every round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.machine import describe_machine, name_checkout
from benchmarks.subject import default_image, make_synthetic_checkpoint, write_jpegs
from florence2.errors import Florence2Error
from parity.report import format_rows
from recipes.nano.exam import Exam

WORKER = Path(__file__).parent / "compare_worker.py"
NANO = Path(__file__).parent.parent / "weights" / "nano"
SCENES_SEED = 4
MIN_TOKENS = 9  # the clock of the decode step needs more than the short answer's 8


@dataclass(frozen=True)
class Round:
    """The measurements of both checkouts in one round, as `compare_worker.measure` returns them."""

    old: dict[str, Any]
    new: dict[str, Any]

    def same_tokens(self) -> bool:
        """Return whether both gave the same answers."""
        return bool(self.old["tokens"] == self.new["tokens"])


def main(arguments: list[str]) -> int:
    """Run the rounds and print the table; return 1 when tokens differ."""
    options = _parser().parse_args(arguments)
    _check(options)
    with tempfile.TemporaryDirectory() as scratch:
        spec = _prepare(options, Path(scratch))
        rounds = [_run_round(options, spec, index) for index in range(options.rounds)]
    same = all(one.same_tokens() and one.new["tokens"] == rounds[0].new["tokens"] for one in rounds)
    document = _document(options, rounds, same)
    print(document)
    if options.output:
        options.output.write_text(document)
    return 0 if same else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT", help="a folder that holds the package florence2")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT")
    parser.add_argument("--model", default="nano", help="nano, base-shape (synthetic weights) or a folder (nano)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each checkout is started (3)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a clock in one process (3)")
    parser.add_argument("--batch", type=int, default=8, help="images in the batch clock (8)")
    parser.add_argument("--mixed", type=int, default=64, help="mixed questions, which only nano is asked (64)")
    parser.add_argument("--tokens", type=int, default=64, help=f"exact length of every answer, from {MIN_TOKENS} (64)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each process")
    parser.add_argument("--output", type=Path, help="also write the table")
    return parser


def _check(options: argparse.Namespace) -> None:
    for checkout in (options.old, options.new):
        if not (checkout / "florence2" / "__init__.py").is_file():
            raise Florence2Error(f"{checkout} is not a checkout: florence2/__init__.py is missing.")
    for name, least in (
        ("rounds", 1),
        ("repeats", 1),
        ("batch", 1),
        ("mixed", 1),
        ("threads", 1),
        ("tokens", MIN_TOKENS),
    ):
        if getattr(options, name) < least:
            raise Florence2Error(f"--{name} is {getattr(options, name)}; it must be at least {least}.")


def _prepare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Make the checkpoint and the images that both checkouts read."""
    if options.model == "base-shape":
        folder = make_synthetic_checkpoint("base", scratch / "base")
    else:
        folder = NANO if options.model == "nano" else Path(options.model)
    return {
        "folder": str(folder.resolve()),
        "images": write_jpegs(default_image(), options.batch, scratch),
        "scenes": _write_scenes(options.mixed, scratch) if options.model == "nano" else [],
        "tokens": options.tokens,
        "repeats": options.repeats,
        "threads": options.threads,
    }


def _write_scenes(count: int, folder: Path) -> list[str]:
    """Write the scenes of the mixed questions, which only nano can answer; return their paths."""
    exam, paths = Exam(SCENES_SEED, count), []
    for i in range(count):
        image = exam[i].image
        assert isinstance(image, Image.Image)
        paths.append(str(folder / f"scene{i}.png"))
        image.save(paths[-1])
    return paths


def _run_round(options: argparse.Namespace, spec: dict[str, Any], index: int) -> Round:
    measured = []
    for name, checkout in (("old", options.old), ("new", options.new)):
        print(f"round {index + 1} of {options.rounds}: {name}", file=sys.stderr)
        measured.append(_run_worker(checkout.resolve(), spec))
    return Round(*measured)


def _run_worker(checkout: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Time one checkout in a fresh process."""
    threads = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps({**spec, "checkout": str(checkout)})],
        cwd=checkout, env={**os.environ, **threads, "PYTHONPATH": str(checkout)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise Florence2Error(f"The checkout {checkout} failed:\n{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def format_comparison(rounds: list[Round]) -> str:
    """Format a table of medians over the rounds, and of the medians of the rounds' own ratios."""
    body = []
    for kind in ("seconds", "bytes"):
        for clock in rounds[0].new[kind]:
            old, new = ([_median(measured[kind][clock]) for measured in side] for side in _sides(rounds))
            ratios = [b / a for a, b in zip(old, new, strict=True) if a]
            show = _show_seconds if kind == "seconds" else _show_bytes
            body.append([clock, show(old), show(new), f"{_median(ratios):.2f}" if ratios else ""])
    return format_rows(["clock", "old", "new", "new / old"], body)


def _sides(rounds: list[Round]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [one.old for one in rounds], [one.new for one in rounds]


def _median(values: float | list[float]) -> float:
    return statistics.median(values) if isinstance(values, list) else values


def _show_seconds(values: list[float]) -> str:
    unit, factor = ("ms", 1e3) if statistics.median(values) < 0.1 else ("s", 1.0)
    low, middle, high = (f"{factor * v:.3g}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} {unit} ({low}–{high})"


def _show_bytes(values: list[float]) -> str:
    return f"{statistics.median(values) / 2**20:.0f} MiB"


def _document(options: argparse.Namespace, rounds: list[Round], same: bool) -> str:
    verdict = "All tokens are the same." if same else "**Tokens differ; the times do not count.**"
    return f"""# Two checkouts

Generated by `python -m benchmarks compare OLD NEW --model {options.model} --rounds {options.rounds}`.
Old: {name_checkout(options.old)}. New: {name_checkout(options.new)}.
{options.model}, cpu, float32, 3 beams, {options.tokens} tokens.
{describe_machine(options.threads)}.
Medians of {options.rounds} rounds of fresh processes, range in brackets.

{verdict}

{format_comparison(rounds)}
"""
