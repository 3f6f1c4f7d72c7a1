"""`python -m parity bench`: ours and the others on one checkpoint, in fresh processes, in turns.

A time counts only when all engines gave the same tokens. Every round starts every engine once; ratios are taken
within a round, since a machine's speed drifts, and the median of the rounds is shown.
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
from florence2.checkpoints.checkpoint import checkpoint_folder, convert_checkpoint, save_checkpoint
from florence2.checkpoints.config_files import read_config, read_image_config
from florence2.checkpoints.files import write_json
from florence2.checkpoints.hub import resolve
from florence2.checkpoints.presets import preset
from florence2.errors import Florence2Error
from florence2.model.config import Florence2Config, Layout
from parity.recipe import make_checkpoint, make_model, make_picture
from parity.report import format_rows

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "BENCHMARK.md"
PROMPT_TOKENS = 13  # of the sentence that "<OD>" stands for


@dataclass(frozen=True)
class Line:
    """One clock: seconds (or bytes) of every engine by rounds, and how close ours is to the machine's limit."""

    clock: str
    rounds: dict[str, list[float]]
    limit: str = ""

    def ratio(self, peer: str) -> float:
        """How many times longer the peer takes, the median of the rounds."""
        pairs = zip(self.rounds[peer], self.rounds["ours"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def main(arguments: list[str]) -> int:
    """Run, print the table, write it; 1 when tokens differ."""
    options = _parser().parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        specs = _prepare(options, Path(scratch))
        folder = Path(specs["ours"].folder)
        config, picture = read_config(folder), read_image_config(folder)
        size = (picture.height, picture.width)
        runs: list[dict[str, Clocks]] = []
        rates: list[Rates] = []
        for number in range(options.rounds):
            rates.append(measure_rates(config, size, options.device, dtype))
            runs.append({name: _run(name, spec, options, number) for name, spec in specs.items()})
    differing = [name for run in runs for name, clocks in run.items() if clocks.tokens != run["ours"].tokens]
    rate = Rates(statistics.median(r.products for r in rates), statistics.median(r.reading for r in rates))
    lines = _lines(runs, config, size, rate, dtype)
    document = _document(options, runs[0], lines, rate, sorted(set(differing)))
    print(document)
    if options.output:
        options.output.write_text(document)
    if options.json:
        described = {"arguments": vars(options), "machine": describe_machine(options.threads), "rates": asdict(rate)}
        write_json(
            options.json, json.loads(json.dumps({**described, "lines": [asdict(li) for li in lines]}, default=str))
        )
    return 1 if differing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m parity bench", description=__doc__)
    parser.add_argument("--model", help="a checkpoint (folder, base, OWNER/NAME); made-up weights without it")
    parser.add_argument("--preset", default="base", help="the shape of made-up weights: base or large (base)")
    parser.add_argument("--peers", default="native", help="native, remote, or both with a comma; empty for none")
    parser.add_argument("--code", type=Path, metavar="DIR", help="the .py files of the remote code; they will run")
    parser.add_argument("--remote-python", default=sys.executable, help="a Python whose transformers runs that code")
    parser.add_argument("--image", type=Path, help="a JPEG file; a made-up picture of 640 x 480 without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every engine")
    parser.add_argument("--batch", type=int, default=8, help="pictures in the batch clock; 1 leaves it out (8)")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="length of every answer, beyond the model's own end")
    parser.add_argument("--rounds", type=int, default=3, help="how often every engine is started (3)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a clock in one process (3)")
    parser.add_argument("--output", type=Path, help=f"also write the table, as the one in parity/{RESULTS.name}")
    parser.add_argument("--json", type=Path, help="also write every figure")
    return parser


def _prepare(options: argparse.Namespace, scratch: Path) -> dict[str, Spec]:
    """What every engine is to run: the same weights in the layout it reads, the same files."""
    peers = [peer for peer in options.peers.split(",") if peer]
    if unknown := set(peers) - {"native", "remote"}:
        raise Florence2Error(f"--peers knows native and remote, not {', '.join(sorted(unknown))}.")
    if "remote" in peers and options.code is None:
        raise Florence2Error("The peer remote needs --code DIR, the folder of its .py files.")
    picture = Image.open(options.image).convert("RGB") if options.image else make_picture(31, 640, 480)
    jpegs = []
    for i in range(max(1, options.batch)):  # pictures of a batch are different ones
        jpegs.append(str(scratch / f"{i}.jpg"))
        picture.rotate(360.0 * i / max(1, options.batch)).save(jpegs[-1], quality=92)
    folders = _checkpoints(options, scratch, {"ours", *peers})
    spec = Spec(
        engine="ours", folder="", jpegs=jpegs, device=options.device, dtype=options.dtype, beams=options.beams,
        tokens=options.tokens, repeats=options.repeats, threads=options.threads, code=str(options.code or ""),
    )  # fmt: skip
    return {name: replace(spec, engine=name, folder=str(folders[name])) for name in ["ours", *peers]}


def _checkpoints(options: argparse.Namespace, scratch: Path, engines: set[str]) -> dict[str, Path]:
    """A folder for every engine: ours and the remote code read Microsoft's layout, transformers its own."""
    given = checkpoint_folder(resolve(options.model)) if options.model else _make_up(options.preset, scratch / "made")
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


def _make_up(name: str, folder: Path) -> Path:
    """Weights of a published shape that the native layout can hold too, which has no final_logits_bias."""
    make_checkpoint(folder, preset("tiny"), seed=0, end_bonus=0.0)  # tokenizer and picture settings
    model = make_model(preset(name), seed=29, end_bonus=0.0)
    model.final_logits_bias.zero_()
    save_checkpoint(model, folder, "microsoft", torch.float16)
    return folder


def _run(name: str, spec: Spec, options: argparse.Namespace, number: int) -> Clocks:
    """One engine in a process of its own."""
    python = options.remote_python if name == "remote" else sys.executable
    print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
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
    """A line for every clock that all engines have."""
    lines = []
    for clock in runs[0]["ours"].seconds:
        rounds = {name: [statistics.median(run[name].seconds[clock]) for run in runs] for name in runs[0]}
        ours = statistics.median(rounds["ours"])
        limit = ""
        if clock == "vision":
            share = count_vision_flops(config, size) / ours / rate.products
            limit = f"{share:.0%} of the rate of products"
        elif clock == "decode step":
            tokens = runs[0]["ours"].image_tokens + PROMPT_TOKENS
            share = count_step_bytes(config, tokens, dtype) / ours / rate.reading
            limit = f"{share:.0%} of the rate of reading"
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
    verdict = f"**Tokens differ: {', '.join(differing)}; no time counts.**" if differing else "All tokens are the same."
    weights = options.model or f"{options.preset}, made-up weights"
    return f"""# Benchmark

Generated by `python -m parity bench{_words(options)}`: {weights}, {options.device}, {options.dtype},
{options.beams} beams, no-repeat 3, {options.tokens} tokens. {describe_machine(options.threads)}.
Products of the vision tower's shapes ran at {rate.products / 1e9:.0f} GFLOP/s, memory was read at
{rate.reading / 1e9:.0f} GB/s. Medians of {options.rounds} rounds of fresh processes, in brackets their range.

{verdict}

{format_rows(head, body)}
"""


def _words(options: argparse.Namespace) -> str:
    """The options that differ from their defaults, as they were given; without machine paths."""
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
