"""The epochs of a fine-tune whose vision tower is frozen, with and without the store of its outputs.

`python -m benchmarks frozen --model base --images 4` trains in turns, without the store and with it, and prints the
seconds of the second epoch and the losses of both. Other benchmarks call `measure_epochs`.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.subject import default_image, make_synthetic_checkpoint
from florence2.checkpoints.checkpoint import checkpoint_folder, load_model
from florence2.checkpoints.hub import resolve
from florence2.processor import Processor
from florence2.train.lora import LoraSettings, add_lora
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings
from florence2.train.store.filling import StoreOptions
from florence2.train.trainer import train

LABELS = 42
"""About so many ids each answer has."""


@dataclass(frozen=True)
class Epochs:
    """What a run took: the seconds of the updates of its second epoch, and its losses step by step."""

    seconds: float
    cpu_seconds: float
    losses: tuple[float, ...]


def measure_epochs(
    checkpoint: Path, folder: Path, images: int, batch: int, *, store: bool, lora: bool = False
) -> Epochs:
    """Train two epochs on synthetic images, in `folder`, and measure the second.

    Args:
        checkpoint: The checkpoint to train.
        folder: A new folder for the run and its store.
        images: How many images, a multiple of `batch`.
        batch: Images of an update.
        store: Train from stored outputs of the vision tower.
        lora: Train an adapter of rank 16 on the language model; otherwise everything but the vision tower.
    """
    processor, model = Processor.from_folder(checkpoint_folder(checkpoint)), load_model(checkpoint)
    steps = images // batch
    settings = TrainSettings(
        steps=2 * steps,
        batch=batch,
        warmup=0,
        log_every=1,
        save_every=3 * steps,
        workers=0,
        freeze=() if lora else ("vision",),
    )
    if lora:
        add_lora(model, LoraSettings(16, 32))
    clocks: list[tuple[float, float]] = []

    def note(*_: Any) -> None:
        clocks.append((time.perf_counter(), time.process_time()))

    options = StoreOptions(folder / "features") if store else None
    train(model, processor, _samples(images, folder), settings, folder / "run", store=options, after_update=note)
    rows = (json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines())
    (began, began_cpu), (ended, ended_cpu) = clocks[steps - 1], clocks[-1]
    return Epochs(ended - began, ended_cpu - began_cpu, tuple(row["loss"] for row in rows))


def _samples(count: int, folder: Path) -> list[Sample]:
    """Write different JPEG files, and ask one question about each."""
    folder.mkdir(parents=True, exist_ok=True)
    answer = "".join(f"circle<loc_{i}><loc_{i + 20}><loc_500><loc_600>" for i in range(LABELS // 5))
    samples = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        default_image().rotate(360 * number / count).save(path, quality=92)
        samples.append(Sample(path, (("<OD>", answer),), path.name))
    return samples


def main(arguments: list[str]) -> int:
    """Measure in turns and print what each run took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks frozen", description=__doc__)
    parser.add_argument("--model", default="nano", help="nano, base (synthetic weights) or a folder (nano)")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lora", action="store_true", help="an adapter on the language model")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(describe_machine(options.threads))
    with tempfile.TemporaryDirectory() as name:
        scratch, taken = Path(name), dict[bool, list[Epochs]]({False: [], True: []})
        synthetic = options.model == "base"
        checkpoint = make_synthetic_checkpoint("base", scratch / "base") if synthetic else resolve(options.model)
        for turn in range(options.rounds):
            for store in taken:
                folder = scratch / f"{turn}-{store}"
                epochs = measure_epochs(
                    checkpoint, folder, options.images, options.batch, store=store, lora=options.lora
                )
                taken[store].append(epochs)
                row = f"{epochs.seconds:8.2f} s  {epochs.cpu_seconds:8.2f} CPU-s  losses {epochs.losses}"
                print(f"{'store' if store else 'plain'}  {row}", flush=True)
    plain, stored = (statistics.median(each.cpu_seconds for each in taken[store]) for store in taken)
    print(
        f"second epoch, CPU time: {plain:.2f} s plain, {stored:.2f} s from the store, {plain / stored:.2f} times faster"
    )
    return 0
