"""`python -m benchmarks train`: this trainer against transformers' native Florence-2 under the usual recipe.

Both train on the same images, prompts and answers in the same order, in the same batches, with the same precision and
no dropout, from the same weights. Each engine has a fresh process in every round. Both are alive at once and make their
updates in turns, because a machine's speed drifts; with `--apart` one runs after the other, for a machine whose memory
does not hold both. Times count only when the losses are equal in every update. The first update of a process also
starts everything, so it has a column of its own and counts in no median.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.subject import default_image, make_synthetic_checkpoint, write_jpegs
from benchmarks.train_worker import LORA_RANK, TrainSpec
from florence2.checkpoints.checkpoint import convert_checkpoint, load_model
from florence2.checkpoints.config_files import read_config
from florence2.checkpoints.files import read_json, write_json
from florence2.errors import Florence2Error
from florence2.train.lora import LoraSettings, add_lora, save_adapter
from parity.report import format_rows

ROOT = Path(__file__).parent.parent
NANO = ROOT / "weights" / "nano"
ENGINES = ("native", "ours")
KINDS = {
    "full": "all parameters",
    "frozen": "without the vision tower",
    "lora": f"LoRA {LORA_RANK} on the language model",
}
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""How far apart two losses may be, relative to the loss: a few roundings, grown by the updates in between."""
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "drop_path_rate")


@dataclass
class Training:
    """One engine's runs: the losses of all updates, the seconds of the first ones and of the rest, peak bytes.

    `processor` holds the same of the processor's time, which other programs on the machine change less.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    peak: int = 0

    def add(self, row: dict[str, float]) -> None:
        """Add an update."""
        self.losses.append(row["loss"])
        self.seconds.append(row["seconds"])
        self.processor.append(row["processor"])

    def end_round(self, steps: int, peak: int) -> None:
        """Set the first of the round's `steps` updates apart; keep the largest peak."""
        self.first.append(self.seconds.pop(-steps))
        self.processor.pop(-steps)
        self.peak = max(self.peak, peak)


@dataclass(frozen=True)
class Contest:
    """One kind of training by both engines."""

    kind: str
    native: Training
    ours: Training

    def difference(self) -> float:
        """Return the largest difference of two losses, relative to the loss."""
        pairs = zip(self.native.losses, self.ours.losses, strict=True)
        return max(abs(ours - native) / abs(native) for native, ours in pairs)

    def speed(self) -> float:
        """Return how many times faster this trainer is: the median over the pairs of updates."""
        return _ratio(self.native.seconds, self.ours.seconds)

    def processor(self) -> float:
        """Return the same of the processor's time."""
        return _ratio(self.native.processor, self.ours.processor)


def _ratio(native: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(theirs / own for theirs, own in zip(native, ours, strict=True))


def main(arguments: list[str]) -> int:
    """Run both engines on every kind and print the table; return 1 when losses differ."""
    options = _parser().parse_args(arguments)
    _check(options)
    with tempfile.TemporaryDirectory() as scratch:
        specs = _prepare(options, Path(scratch))
        contests = [_run(kind, [replace(spec, kind=kind) for spec in specs], options) for kind in options.kinds]
    equal = all(contest.difference() <= TOLERANCE[options.precision] for contest in contests)
    document = _document(options, arguments, contests, equal)
    print(document)
    if options.output:
        options.output.write_text(document)
    if options.json:
        write_json(options.json, {"machine": describe_machine(), "contests": [asdict(one) for one in contests]})
    return 0 if equal else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__)
    parser.add_argument(
        "--shape", default="nano", choices=("nano", "base", "large", "tiny"), help="of the model (nano)"
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=tuple(KINDS), help="default: all three")
    parser.add_argument("--rounds", type=int, default=1, help="how often each engine is started (1)")
    parser.add_argument("--apart", action="store_true", help="one engine after the other, to need half the memory")
    parser.add_argument("--steps", type=int, default=6, help="updates, the first of them not timed (6)")
    parser.add_argument("--batch", type=int, default=2, help="images of an update (2)")
    parser.add_argument(
        "--images", type=int, help="different images; after them a new epoch begins (as many as needed)"
    )
    parser.add_argument("--words", type=int, default=8, help="things in the longest answer, five ids each (8)")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both engines")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=tuple(TOLERANCE))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each engine")
    parser.add_argument("--output", type=Path, help="also write the table")
    parser.add_argument("--json", type=Path, help="also write every loss and time as JSON")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, least in (("rounds", 1), ("steps", 2), ("batch", 1), ("words", 1), ("threads", 1)):
        if getattr(options, name) < least:
            raise Florence2Error(f"--{name} is {getattr(options, name)}; it must be at least {least}.")
    if options.images is not None and options.images < options.batch:
        raise Florence2Error(f"--images is {options.images}; it must be at least --batch, {options.batch}.")


def _prepare(options: argparse.Namespace, scratch: Path) -> list[TrainSpec]:
    """Write the checkpoint in both layouts, the images and the adapter; return what each engine is to do."""
    given = NANO if options.shape == "nano" else make_synthetic_checkpoint(options.shape, scratch / "synthetic")
    native, own = scratch / "native", scratch / "microsoft"
    for folder, layout in ((own, "microsoft"), (native, "native")):
        convert_checkpoint(given, folder, layout)  # type: ignore[arg-type]
        write_json(folder / "config.json", _without_dropout(read_json(folder / "config.json")))
    if "lora" in options.kinds:
        model = load_model(own)
        add_lora(model, LoraSettings(LORA_RANK, 2 * LORA_RANK))
        save_adapter(model, scratch / "adapter", "native")
    count = options.images or options.steps * options.batch
    spec = TrainSpec(
        engine="", kind="", folder="", rows=_rows(count, options.words, scratch), adapter=str(scratch / "adapter"),
        steps=options.steps, batch=options.batch, learning_rate=options.learning_rate,
        vocabulary=read_config(own).text.vocab_size,
        gradient_checkpointing=options.gradient_checkpointing, device=options.device,
        precision=options.precision, threads=options.threads,
    )  # fmt: skip
    return [replace(spec, engine="native", folder=str(native)), replace(spec, engine="ours", folder=str(own))]


def _without_dropout(value: Any) -> Any:
    """Return a configuration whose rates of dropout are all 0, so that losses can be compared."""
    if not isinstance(value, dict):
        return value
    return {key: 0.0 if key in _DROPOUTS else _without_dropout(inner) for key, inner in value.items()}


def _rows(count: int, most: int, scratch: Path) -> list[tuple[str, str, str]]:
    """Write the images; ask for the things on them, of which there are 1 to `most`."""
    rows = []
    for index, image in enumerate(write_jpegs(default_image(), count, scratch)):
        things = 1 + index * 5 % most
        places = [[(37 * index + 61 * thing + 211 * side) % 1000 for side in range(4)] for thing in range(things)]
        answer = "".join("circle" + "".join(f"<loc_{place}>" for place in sorted(four)) for four in places)
        rows.append((image, "<OD>", answer))
    return rows


def _run(kind: str, specs: Sequence[TrainSpec], options: argparse.Namespace) -> Contest:
    """Let both engines make their updates, in turns or one after the other."""
    trainings = {spec.engine: Training() for spec in specs}
    for index in range(options.rounds):
        print(f"{kind}: round {index + 1} of {options.rounds}", file=sys.stderr)
        for together in [[spec] for spec in specs] if options.apart else [specs]:
            _run_together(together, trainings)
    return Contest(kind, trainings["native"], trainings["ours"])


def _run_together(specs: Sequence[TrainSpec], trainings: dict[str, Training]) -> None:
    """Start the engines and let each make an update in turn, first one and then the other first."""
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(spec)) for spec in specs]
        for step in range(specs[0].steps):
            for worker in workers if step % 2 else workers[::-1]:
                trainings[worker.engine].add(worker.update())
        for worker in workers:
            trainings[worker.engine].end_round(specs[0].steps, worker.read()["peak"])


class _Worker:
    """The process of one engine."""

    def __init__(self, spec: TrainSpec):
        self.engine = spec.engine
        # threads that wait for work must not take the cores from the other engine
        quiet = {"OMP_NUM_THREADS": str(spec.threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_worker", json.dumps(asdict(spec))],
            cwd=ROOT, env={**os.environ, **quiet, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def update(self) -> dict[str, Any]:
        """Have one update made."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """Return the next line. Raises Florence2Error with the end of its stderr when the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise Florence2Error(f"The engine {self.engine} failed:\n{self.errors.read()[-3000:]}")
        row: dict[str, Any] = json.loads(line)
        return row


def _document(options: argparse.Namespace, arguments: Sequence[str], contests: Sequence[Contest], equal: bool) -> str:
    verdict = (
        "The losses of all updates are equal up to rounding." if equal else "**Losses differ; the times do not count.**"
    )
    turns = "one after the other" if options.apart else "in turns"
    return f"""# Training

Generated by `python -m benchmarks train {shlex.join(arguments)}`: {options.shape}, {options.device},
{options.precision}, {options.steps} updates of {options.batch} images, AdamW fused in both, no dropout.
{describe_machine(options.threads)}, transformers {version("transformers")}.
Medians of the updates after the first, in {options.rounds} round{"s" * (options.rounds > 1)}, the engines {turns}.
Peak memory is that of the whole process, or of the GPU.

{verdict}

{format_contests(contests, options.batch)}
"""


def format_contests(contests: Sequence[Contest], batch: int) -> str:
    """Format a row for each kind."""
    head = [
        "what trains",
        "native, s/update",
        "this, s/update",
        "images/s",
        "faster",
        "by processor time",
        "native, MiB",
        "this, MiB",
    ]
    head += ["memory", "first update", "largest difference of losses"]
    body = []
    for one in contests:
        native, own = (statistics.median(training.seconds) for training in (one.native, one.ours))
        body.append(
            [
                KINDS[one.kind],
                f"{native:.3g}",
                f"{own:.3g}",
                f"{batch / own:.3g}",
                f"{one.speed():.2f}x",
                f"{one.processor():.2f}x",
                f"{one.native.peak / 2**20:.0f}",
                f"{one.ours.peak / 2**20:.0f}",
                f"{one.ours.peak / one.native.peak:.2f}x",
                f"{statistics.median(one.native.first):.3g} s, {statistics.median(one.ours.first):.3g} s",
                f"{one.difference():.1e}",
            ]
        )
    return format_rows(head, body)
