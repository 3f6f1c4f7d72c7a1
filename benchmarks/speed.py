"""`python -m benchmarks speed`: this project and its references on one checkpoint, in fresh processes, in turns.

Times count only when all engines gave the same tokens. Every round starts every engine once. Ratios are taken within
a round, because a machine's speed drifts; the table shows the median over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from benchmarks.engines import Clocks, Spec
from benchmarks.machine import Rates, count_step_bytes, count_vision_flops, describe_machine, measure_rates
from benchmarks.subject import default_image, make_synthetic_checkpoint, write_jpegs
from florence2.checkpoints.checkpoint import checkpoint_folder, convert_checkpoint
from florence2.checkpoints.config_files import read_config, read_image_config
from florence2.checkpoints.files import write_json
from florence2.checkpoints.hub import resolve
from florence2.errors import Florence2Error
from florence2.model.config import Florence2Config, Layout
from parity.report import format_rows

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "BENCHMARK.md"
PROMPT_TOKENS = 13  # of the sentence that "<OD>" stands for


@dataclass(frozen=True)
class Line:
    """One clock: every engine's seconds (or bytes) by round, and how close ours is to the machine's limit."""

    clock: str
    rounds: dict[str, list[float]]
    limit: str = ""

    def ratio(self, peer: str) -> float:
        """Return how many times longer the peer takes: the median of the rounds' own ratios."""
        pairs = zip(self.rounds[peer], self.rounds["ours"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def main(arguments: list[str]) -> int:
    """Run every engine, print the table and write it; return 1 when tokens differ."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        specs = _prepare(options, Path(scratch))
        folder = Path(specs["ours"].folder)
        config, image = read_config(folder), read_image_config(folder)
        size = (image.height, image.width)
        runs, rate = _run_rounds(options, specs, config, size)
    differing = sorted({name for run in runs for name, clocks in run.items() if clocks.tokens != run["ours"].tokens})
    lines = _lines(runs, config, size, rate, getattr(torch, options.dtype))
    document = _document(options, runs[0], lines, rate, differing)
    print(document)
    if options.output:
        options.output.write_text(document)
    if options.json:
        _write_lines(options, rate, lines)
    return 1 if differing else 0


def _run_rounds(
    options: argparse.Namespace, specs: dict[str, Spec], config: Florence2Config, size: tuple[int, int]
) -> tuple[list[dict[str, Clocks]], Rates]:
    """Start every engine once a round, and measure the machine's limits before each round."""
    runs: list[dict[str, Clocks]] = []
    rates: list[Rates] = []
    for round_index in range(options.rounds):
        rates.append(measure_rates(config, size, options.device, getattr(torch, options.dtype)))
        runs.append({name: _run(name, spec, options, round_index) for name, spec in specs.items()})
    return runs, Rates(statistics.median(r.products for r in rates), statistics.median(r.reading for r in rates))


def _write_lines(options: argparse.Namespace, rate: Rates, lines: list[Line]) -> None:
    """Write every time of every round as JSON."""
    record = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "machine": describe_machine(options.threads),
        "rates": asdict(rate),
        "lines": [asdict(line) for line in lines],
    }
    write_json(options.json, record)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__)
    parser.add_argument("--model", help="a checkpoint: name, OWNER/NAME or folder; synthetic weights without it")
    parser.add_argument("--preset", default="base", help="the shape of the synthetic weights: base or large (base)")
    parser.add_argument("--peers", default="native", help="native, remote, or native,remote; empty for none (native)")
    parser.add_argument(
        "--code", type=Path, metavar="DIR", help="the folder of the remote code's .py files, which will be executed"
    )
    parser.add_argument(
        "--remote-python", default=sys.executable, help="a Python interpreter whose transformers runs that code"
    )
    parser.add_argument("--image", type=Path, help="an image file; a synthetic image of 640 x 480 without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every engine")
    parser.add_argument("--batch", type=int, default=8, help="images in the batch clock; 1 omits it (8)")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="exact length of every answer (64)")
    parser.add_argument("--rounds", type=int, default=3, help="how often every engine is started (3)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a clock in one process (3)")
    parser.add_argument("--output", type=Path, help=f"also write the table, such as benchmarks/{RESULTS.name}")
    parser.add_argument("--json", type=Path, help="also write every time as JSON")
    return parser


def _prepare(options: argparse.Namespace, scratch: Path) -> dict[str, Spec]:
    """Describe the work of every engine: the same weights in the layout it reads, and the same files."""
    peers = [peer for peer in options.peers.split(",") if peer]
    if unknown := set(peers) - {"native", "remote"}:
        raise Florence2Error(f"Unknown --peers {', '.join(sorted(unknown))}. Known peers: native, remote.")
    if "remote" in peers and options.code is None:
        raise Florence2Error("--peers remote needs --code DIR, the folder of the remote code's .py files.")
    image = Image.open(options.image).convert("RGB") if options.image else default_image()
    jpegs = write_jpegs(image, max(1, options.batch), scratch)
    folders = _checkpoints(options, scratch, {"ours", *peers})
    spec = Spec(
        engine="ours", folder="", jpegs=jpegs, device=options.device, dtype=options.dtype, beams=options.beams,
        tokens=options.tokens, repeats=options.repeats, threads=options.threads, code=str(options.code or ""),
    )  # fmt: skip
    return {name: replace(spec, engine=name, folder=str(folders[name])) for name in ["ours", *peers]}


def _checkpoints(options: argparse.Namespace, scratch: Path, engines: set[str]) -> dict[str, Path]:
    """Return a folder for every engine: ours and the remote code read Microsoft's layout, transformers its own."""
    if options.model:
        given = checkpoint_folder(resolve(options.model))
    else:
        given = make_synthetic_checkpoint(options.preset, scratch / "synthetic")
    layouts: dict[str, Layout] = {"ours": "microsoft", "remote": "microsoft", "native": "native"}
    folders = {}
    for engine in engines:
        layout = layouts[engine]
        if read_config(given).layout == layout:
            folders[engine] = given
            continue
        folders[engine] = scratch / layout
        if not folders[engine].exists():
            convert_checkpoint(given, folders[engine], layout)
    return folders


def _run(name: str, spec: Spec, options: argparse.Namespace, round_index: int) -> Clocks:
    """Run one engine in its own process."""
    python = options.remote_python if name == "remote" else sys.executable
    print(f"round {round_index + 1} of {options.rounds}: {name}", file=sys.stderr)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-m", "benchmarks.engines", json.dumps(asdict(spec))],
        cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise Florence2Error(f"The engine {name} failed:\n{done.stderr[-3000:]}")
    return Clocks(**json.loads(done.stdout.splitlines()[-1]))


def _lines(
    runs: list[dict[str, Clocks]], config: Florence2Config, size: tuple[int, int], rate: Rates, dtype: torch.dtype
) -> list[Line]:
    """Collect a line for every clock."""
    lines = []
    for clock in runs[0]["ours"].seconds:
        rounds = {name: [statistics.median(run[name].seconds[clock]) for run in runs] for name in runs[0]}
        ours = statistics.median(rounds["ours"])
        limit = ""
        if clock == "vision":
            share = count_vision_flops(config, size) / ours / rate.products
            limit = f"{share:.0%} of the product rate"
        elif clock == "decode step":
            tokens = runs[0]["ours"].image_tokens + PROMPT_TOKENS
            share = count_step_bytes(config, tokens, dtype) / ours / rate.reading
            limit = f"{share:.0%} of the reading rate"
        lines.append(Line(clock, rounds, limit))
    memory = {name: [float(run[name].peak_memory) for run in runs] for name in runs[0]}
    return [*lines, Line("peak memory", memory)]


def _document(
    options: argparse.Namespace, run: dict[str, Clocks], lines: list[Line], rate: Rates, differing: list[str]
) -> str:
    peers = [name for name in run if name != "ours"]
    head = ["clock", run["ours"].name, *(run[peer].name for peer in peers), *(f"ratio to {peer}" for peer in peers), ""]
    body = []
    for line in lines:
        times = [_show(line, name) for name in run]
        body.append([line.clock, *times, *(f"{line.ratio(peer):.2f}" for peer in peers), line.limit])
    verdict = (
        f"**Tokens differ ({', '.join(differing)}); the times do not count.**"
        if differing
        else "All tokens are the same."
    )
    weights = options.model or f"{options.preset}, synthetic weights"
    return f"""# Benchmark

Generated by `python -m benchmarks speed{_words(options)}`: {weights}, {options.device}, {options.dtype},
{options.beams} beams, no-repeat 3, {options.tokens} tokens. {describe_machine(options.threads)}.
The machine's limits: {rate.products / 1e9:.0f} GFLOP/s for matrix products of the vision tower's shapes, and
{rate.reading / 1e9:.0f} GB/s for reading RAM. Medians of {options.rounds} rounds of fresh processes, range in brackets.

{verdict}

{format_rows(head, body)}
"""


def _words(options: argparse.Namespace) -> str:
    """Return the options that differ from their defaults, without paths of this machine."""
    skipped = {"output", "json", "code", "remote_python", "model", "image"}
    defaults = vars(_parser().parse_args([]))
    changed = {name: value for name, value in vars(options).items() if value != defaults[name] and name not in skipped}
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())


def _show(line: Line, name: str) -> str:
    values = line.rounds[name]
    if line.clock == "peak memory":
        return f"{statistics.median(values) / 2**20:.0f} MiB"
    unit, factor = ("ms", 1e3) if statistics.median(values) < 0.1 else ("s", 1.0)
    low, middle, high = (f"{factor * v:.3g}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} {unit} ({low}–{high})"
