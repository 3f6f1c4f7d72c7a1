"""`florence2 train DATA --model base --out DIR`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from florence2.checkpoint import checkpoint_folder, copy_companions, load_model, save_checkpoint, stored_dtype
from florence2.devices import choose_device
from florence2.errors import OptionError
from florence2.hub import DEFAULT_MODEL, resolve
from florence2.model import Florence2Model
from florence2.pipeline import Florence2
from florence2.processor import Processor
from florence2.tensors import find_weights
from florence2.train.check import check_samples
from florence2.train.data import Sample
from florence2.train.entries import DataError
from florence2.train.evaluate import evaluate
from florence2.train.freeze import PARTS, count_trainable
from florence2.train.lora import LoraSettings, add_lora, save_adapter
from florence2.train.settings import TrainSettings
from florence2.train.sources import read_samples

CHECKPOINT, ADAPTER, CURVE = "checkpoint", "adapter", "curve.png"


def main(arguments: Sequence[str]) -> int:
    """Check the data, train, and write the run folder; 1 when `--check` finds labels that would be lost or cut."""
    options = build_parser().parse_args(arguments)
    if options.out is None and not options.check:
        raise OptionError("Where to? Give --out DIR for the run, or --check to look at the data only.")
    path = resolve(options.model, revision=options.revision)
    processor = Processor.from_folder(checkpoint_folder(path))
    samples = read_samples(options.data, options.images, tasks=options.task)
    device = choose_device(options.device)
    # in bfloat16 on a CPU the backward pass of torch's fused attention takes twice as long as the written-out one
    written_out = device.type == "cpu" and options.precision == "bfloat16"
    model = load_model(path, device=device, attention="eager" if written_out else "sdpa")
    report = check_samples(samples, processor, *_room(model, processor))
    print(report, file=sys.stdout if options.check else sys.stderr)
    if options.check:
        return 1 if report.findings else 0
    if report.refused or report.unreadable:
        raise DataError("Not every prompt and picture can be used, see above; mend them or leave them out.")
    _train(options, model, processor, samples, path)
    return 0


def _room(model: Florence2Model, processor: Processor) -> tuple[int, int]:
    """How many ids an answer may have, and how many a prompt: the image tokens take positions too."""
    positions, size = model.config.text.max_position_embeddings, processor.image_config
    with torch.no_grad():
        image_tokens = model.encode_image(torch.zeros(1, 3, size.height, size.width)).shape[1]
    return positions, positions - image_tokens


def _train(
    options: argparse.Namespace, model: Florence2Model, processor: Processor, samples: list[Sample], path: Path
) -> None:
    from florence2.train.plot import plot_log
    from florence2.train.trainer import train  # accelerate takes a second to import, and --check does without

    settings = _settings(options, len(samples))
    lora = LoraSettings(options.lora, options.lora_alpha or 2 * options.lora) if options.lora else None
    if lora:
        add_lora(model, lora)
    held_out = read_samples(options.validation, options.images) if options.validation else []

    def measure() -> dict[str, Any]:
        return {"evaluation": evaluate(Florence2(model, processor), held_out)} if held_out else {}

    notes = {"data": str(options.data), "model": options.model, "lora": asdict(lora) if lora else None}
    print(_describe(model, settings), file=sys.stderr)
    train(model, processor, samples, settings, options.out, notes, lambda _: measure())
    plot_log(options.out / "log.jsonl", options.out / CURVE)
    if lora:
        save_adapter(model, options.out / ADAPTER)
        print(options.out / ADAPTER)
        return
    target = options.out / CHECKPOINT
    save_checkpoint(model, target, model.config.layout, stored_dtype(find_weights(path)))
    copy_companions(checkpoint_folder(path), target)
    print(target)


def _settings(options: argparse.Namespace, count: int) -> TrainSettings:
    steps = options.steps or max(1, round(options.epochs * count / options.batch))
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
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--save-every", type=int, default=500, help="updates between states (500), and at the end")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare pictures (1)")
    return parser
