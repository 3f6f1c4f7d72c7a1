"""`florence2 train DATA --model base --out DIR`."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from florence2.bulk.sinks import Progress
from florence2.checkpoints.checkpoint import (
    checkpoint_folder,
    copy_companions,
    load_model,
    save_checkpoint,
    stored_dtype,
)
from florence2.checkpoints.hub import DEFAULT_MODEL, resolve
from florence2.checkpoints.tensors import find_weights
from florence2.devices import choose_device
from florence2.errors import OptionError
from florence2.model.florence2 import Florence2Model
from florence2.pipeline import Florence2
from florence2.processor import Processor
from florence2.train.check import SampleFault, check_samples
from florence2.train.data import Sample
from florence2.train.entries import DataError
from florence2.train.evaluate import evaluate
from florence2.train.freeze import PARTS, count_trainable, freeze
from florence2.train.lora import LoraSettings, add_lora, save_adapter
from florence2.train.settings import TrainSettings
from florence2.train.sources import read_samples

CHECKPOINT, ADAPTER, CURVE = "checkpoint", "adapter", "curve.png"
_NAMES_HELP = "how its file names modules: for peft on which model (ours; florence2 itself reads all three)"
_MOST_EPOCHS = 1_000_000


def main(arguments: Sequence[str]) -> int:
    """Check the data, train, and write the run folder; 1 when `--check` finds labels that would be lost or cut."""
    options = build_parser().parse_args(arguments)
    _check_options(options)
    path = resolve(options.model, revision=options.revision)
    processor = Processor.from_folder(checkpoint_folder(path))
    samples = read_samples(options.data, options.images, tasks=options.task)
    held_out = _held_out(options)
    settings = _settings(options, len(samples))
    device = choose_device(options.device)
    # in bfloat16 on a CPU the backward pass of torch's fused attention takes twice as long as the written-out one
    written_out = device.type == "cpu" and options.precision == "bfloat16"
    model = load_model(path, device=device, attention="eager" if written_out else "sdpa")
    lora = None if options.check else _restrict(options, settings, model)
    say = print if options.check else _tell
    findings = _report(samples, model, processor, say)
    if held_out:
        say("Of --validation:")
        findings += _report(held_out, model, processor, say)
    if options.check:
        return 1 if findings else 0
    if any(finding.fault in ("refused", "unreadable") for finding in findings):
        raise DataError("Not every prompt and picture can be used, see above; mend them or leave them out.")
    _train(options, settings, lora, model, processor, samples, held_out, path)
    return 0


def _restrict(options: argparse.Namespace, settings: TrainSettings, model: Florence2Model) -> LoraSettings | None:
    """Leave only that of the model to be trained which is meant to be."""
    lora = _lora(options)
    if lora:
        add_lora(model, lora, settings.seed)
    freeze(model, settings.freeze)
    return lora


def _check_options(options: argparse.Namespace) -> None:
    """Refuse what `TrainSettings` and `LoraSettings` do not see. Raises OptionError."""
    if options.out is None and not options.check:
        raise OptionError("Where to? Give --out DIR for the run, or --check to look at the data only.")
    if not 0 < options.epochs <= _MOST_EPOCHS:
        raise OptionError(f"--epochs is {options.epochs}; it must be above 0 and at most {_MOST_EPOCHS:,}.")
    if options.batch < 1:
        raise OptionError(f"--batch is {options.batch}; it must be at least 1.")
    if options.lora is None and (options.lora_alpha is not None or options.lora_names != "ours"):
        raise OptionError("--lora-alpha and --lora-names are for an adapter; give --lora RANK too, or leave them out.")


def _held_out(options: argparse.Namespace) -> list[Sample]:
    """The samples of `--validation`; of a COCO file they are asked what is trained."""
    if options.validation is None:
        return []
    tasks = options.task if options.validation.suffix.lower() == ".json" else ()
    return read_samples(options.validation, options.images, sys.maxsize, tasks)


def _report(
    samples: list[Sample], model: Florence2Model, processor: Processor, say: Callable[[str], None]
) -> tuple[SampleFault, ...]:
    """Say what of the samples would be lost or cut."""
    report = check_samples(samples, processor, *_room(model, processor))
    say(str(report))
    return report.findings


def _tell(text: str) -> None:
    """To stderr, by the first of several processes: launchers number them so."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def _room(model: Florence2Model, processor: Processor) -> tuple[int, int]:
    """How many ids an answer may have, and how many a prompt: the image tokens take positions too."""
    positions, size = model.config.text.max_position_embeddings, processor.image_config
    with torch.no_grad():
        image_tokens = model.encode_image(torch.zeros(1, 3, size.height, size.width)).shape[1]
    return positions, positions - image_tokens


def _train(
    options: argparse.Namespace,
    settings: TrainSettings,
    lora: LoraSettings | None,
    model: Florence2Model,
    processor: Processor,
    samples: list[Sample],
    held_out: list[Sample],
    path: Path,
) -> None:
    from florence2.train.trainer import is_first_process, train  # accelerate takes a second, and --check does without

    def after_save(step: int) -> dict[str, Any]:
        if step < settings.steps:
            _plot(options.out)
        return {"evaluation": _measure(Florence2(model, processor), held_out)} if held_out else {}

    _tell(_describe(model, settings))
    train(model, processor, samples, settings, options.out, _notes(options, lora, samples), after_save)
    if is_first_process():
        print(_write_result(model, options, path))


def _lora(options: argparse.Namespace) -> LoraSettings | None:
    if options.lora is None:
        return None
    return LoraSettings(options.lora, 2 * options.lora if options.lora_alpha is None else options.lora_alpha)


def _notes(options: argparse.Namespace, lora: LoraSettings | None, samples: list[Sample]) -> dict[str, Any]:
    """What a run depends on beside its settings. The digest is of the questions and answers, not of the pictures."""
    given = ("data", "images", "validation", "model", "revision")
    notes = {name: None if (value := getattr(options, name)) is None else str(value) for name in given}
    questions = json.dumps([(sample.name, sample.pairs) for sample in samples])
    digest = hashlib.sha256(questions.encode()).hexdigest()[:16]
    return {**notes, "task": options.task, "questions": digest, "lora": asdict(lora) if lora else None}


def _measure(model: Florence2, held_out: list[Sample]) -> dict[str, Any]:
    """The metrics of `--validation`; how far it is goes to stderr."""
    progress = Progress(len(held_out))
    try:
        return dict(evaluate(model, held_out, progress=lambda done, _: progress.show(done)))
    finally:
        progress.close()


def _plot(folder: Path) -> None:
    from florence2.train.plot import plot_log

    plot_log(folder / "log.jsonl", folder / CURVE)


def _write_result(model: Florence2Model, options: argparse.Namespace, path: Path) -> Path:
    """Write the adapter, or the checkpoint in layout and type of the one at `path`, and the curve."""
    _plot(options.out)
    if options.lora is not None:
        target: Path = options.out / ADAPTER
        save_adapter(model, target, None if options.lora_names == "ours" else options.lora_names)
        return target
    target = options.out / CHECKPOINT
    save_checkpoint(model, target, model.config.layout, stored_dtype(find_weights(path)))
    copy_companions(checkpoint_folder(path), target)
    return target


def _settings(options: argparse.Namespace, count: int) -> TrainSettings:
    steps = max(1, round(options.epochs * count / options.batch)) if options.steps is None else options.steps
    warmup = options.warmup if options.warmup is not None else min(100, steps // 10)
    names = "batch micro_batch learning_rate weight_decay clip seed precision gradient_checkpointing log_every workers"
    given = {name: getattr(options, name) for name in names.split()}
    return TrainSettings(
        steps=steps, warmup=warmup, freeze=tuple(options.freeze), save_every=options.save_every, **given
    )


def _describe(model: Florence2Model, settings: TrainSettings) -> str:
    rows = [f"{name}: {train:,} of {all:,}" for name, (train, all) in count_trainable(model).items()]
    return f"{settings.steps} steps of {settings.batch} pictures. Parameters that train: " + "; ".join(rows) + "."


def build_parser() -> argparse.ArgumentParser:
    """The grammar of the command."""
    parser = argparse.ArgumentParser(prog="florence2 train", description=main.__doc__)
    parser.add_argument("data", type=Path, help="JSON Lines of image, prefix, suffix; or a COCO file")
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"name, folder or file to start from ({DEFAULT_MODEL})")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder; one begun before is gone on with")
    parser.add_argument("--task", action="append", default=[], help="what to ask of a COCO file (its usual task)")
    parser.add_argument("--images", type=Path, help="where the pictures are (beside DATA)")
    parser.add_argument("--validation", type=Path, metavar="DATA", help="measured whenever the state is saved")
    parser.add_argument("--check", action="store_true", help="only say what of DATA would be lost or cut")
    parser.add_argument("--epochs", type=float, default=3.0, help="times through the data (3)")
    parser.add_argument("--steps", type=int, help="updates, in place of --epochs")
    parser.add_argument("--batch", type=int, default=8, help="pictures an update, over all processes (8)")
    parser.add_argument("--micro-batch", type=int, help="pictures computed at once (all)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="the highest (1e-5)")
    parser.add_argument("--warmup", type=int, help="updates until then (a tenth, at most 100)")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, default=1.0, help="bound of the gradient's norm (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--freeze", nargs="+", default=[], metavar="PART", help=f"{', '.join(PARTS)}, or module paths")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank, not the weights")
    parser.add_argument("--lora-alpha", type=float, help="its scale (twice the rank)")
    parser.add_argument("--lora-names", choices=("ours", "native", "microsoft"), default="ours", help=_NAMES_HELP)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--save-every", type=int, default=500, help="updates between states (500), and at the end")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare pictures (1)")
    return parser
