"""One run of `florence2 train`, from checked options to the files in the output folder."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from florence2.answers.confidence import NO_CALIBRATION
from florence2.checkpoints.checkpoint import (
    checkpoint_folder,
    copy_companions,
    load_model,
    save_checkpoint,
)
from florence2.checkpoints.checks.empty import Prepare
from florence2.checkpoints.checks.loading import choose_device
from florence2.checkpoints.describe import stored_dtype
from florence2.checkpoints.files import write_tasks
from florence2.checkpoints.tensors import find_weights
from florence2.cli.options.arguments import model_changes
from florence2.cli.progress import Progress
from florence2.errors import OptionError
from florence2.inputs.tasks import Task, token_task
from florence2.model.florence2 import Florence2Model
from florence2.pipeline import Florence2
from florence2.processor import Processor
from florence2.train.check import SampleFault, check_samples
from florence2.train.command import training_settings
from florence2.train.entries import DataError
from florence2.train.evaluate import evaluate
from florence2.train.freeze import count_trainable, freeze
from florence2.train.lora import LoraSettings, add_lora, save_adapter
from florence2.train.needs import RunMemory, check_disk, describe_memory, describe_padding, expect_memory
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings
from florence2.train.sources import find_new_tasks, read_samples
from florence2.train.store.filling import DEFAULT_LIMIT, StoreOptions
from florence2.train.store.images import StoredImages
from florence2.train.store.tower import is_frozen

CHECKPOINT, ADAPTER, CURVE, FEATURES = "checkpoint", "adapter", "curve.png", "features"


def run(options: argparse.Namespace, path: Path) -> int:
    """Check the data and train the checkpoint at `path`; return the exit code (see `command.main`)."""
    processor = _with_tasks(options, Processor.from_folder(checkpoint_folder(path), calibration=NO_CALIBRATION))
    samples = read_samples(options.data, options.images, tasks=options.task, known=processor.tasks)
    held_out = _held_out(options, processor.tasks)
    settings = training_settings(options, len(samples))
    device = choose_device(options.device)
    # in bfloat16 on a CPU the backward pass of torch's fused attention takes twice as long as eager attention's
    eager = device.type == "cpu" and options.precision == "bfloat16"
    changes = model_changes(options)
    model = load_model(path, device=device, attention="eager" if eager else "sdpa", **changes)
    f = Florence2(model, processor, prepare=changes["prepare"])
    lora = None if options.check else _restrict(options, settings, f.model)
    store = None if options.check else choose_store(options, settings, f.model, len(samples))
    say = print if options.check else _say
    findings = _report(samples, f, say)
    if held_out:
        say("In --validation:")
        findings += _report(held_out, f, say)
    if options.check:
        return 1 if findings else 0
    if any(finding.fault in ("refused", "unreadable") for finding in findings):
        raise DataError("Some prompts or images cannot be used (see above). Correct them or leave them out.")
    _train(
        options,
        path,
        settings,
        lora,
        f,
        samples,
        held_out,
        store,
        finish=lambda: print(_write_result(f, options, path, changes["prepare"])),
    )
    return 0


def _with_tasks(options: argparse.Namespace, processor: Processor) -> Processor:
    """Add the tasks of `--task-kind`, and those that the data brings, which are answered with text."""
    table = processor.tasks.declared(options.task_kind)
    new = find_new_tasks([path for path in (options.data, options.validation) if path is not None], table)
    if new:
        _say(
            f"New tasks in the data, which the model reads as they are written and answers with text: {', '.join(new)}."
            " For other answers give --task-kind NAME=KIND."
        )
    return processor.changed(tasks=table.declared(map(token_task, new)))


def _held_out(options: argparse.Namespace, known: Mapping[str, Task]) -> list[Sample]:
    """Read the samples of `--validation`; a COCO file is asked the tasks that are trained."""
    if options.validation is None:
        return []
    tasks = options.task if options.validation.suffix.lower() == ".json" else ()
    return read_samples(options.validation, options.images, sys.maxsize, tasks, known)


def _restrict(options: argparse.Namespace, settings: TrainSettings, model: Florence2Model) -> LoraSettings | None:
    """Add the adapter, if there is to be one, and freeze the parts that do not train."""
    lora = _lora(options)
    if lora:
        add_lora(model, lora, settings.seed)
    freeze(model, settings.freeze)
    return lora


def _lora(options: argparse.Namespace) -> LoraSettings | None:
    if options.lora is None:
        return None
    return LoraSettings(options.lora, 2 * options.lora if options.lora_alpha is None else options.lora_alpha)


def choose_store(
    options: argparse.Namespace, settings: TrainSettings, model: Florence2Model, count: int
) -> StoreOptions | None:
    """Return where the features of a frozen vision tower are kept; None where it trains or nothing would be gained."""
    wanted = options.store is not None or options.store_limit is not None
    if not is_frozen(model):
        if wanted:
            raise OptionError(
                "--store and --store-limit keep features of a frozen vision tower, but here it trains. Give --freeze "
                "vision or --lora, or leave them out."
            )
        return None
    if settings.varies_images:
        if wanted:
            raise OptionError(
                "--flip, --shrink and --colour show an image differently in each epoch, so its features cannot be "
                "stored. Leave these out, or --store and --store-limit."
            )
        if not options.no_store:
            _say("Images vary, so the frozen vision tower encodes them in every epoch.")
        return None
    again = settings.steps > count // settings.batch  # otherwise no image is seen twice
    if options.no_store or not (again or options.store):
        return None
    return StoreOptions(options.store or options.out / FEATURES, options.store_limit or DEFAULT_LIMIT)


def _report(samples: list[Sample], f: Florence2, say: Callable[[str], None]) -> tuple[SampleFault, ...]:
    """Say which samples would be lost or cut."""
    report = check_samples(samples, f.processor, *_limits(f.model, f.processor))
    say(str(report))
    return report.findings


def _limits(model: Florence2Model, processor: Processor) -> tuple[int, int]:
    """Return how many ids an answer may have, and how many a prompt: image tokens take positions too."""
    positions, size = model.config.text.max_position_embeddings, processor.image_config
    with torch.no_grad():
        image_tokens = model.encode_image(torch.zeros(1, 3, size.height, size.width)).shape[1]
    return positions, positions - image_tokens


def _say(text: str) -> None:
    """Print to stderr, in the first of several processes: launchers number them in RANK."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def _train(
    options: argparse.Namespace,
    path: Path,
    settings: TrainSettings,
    lora: LoraSettings | None,
    f: Florence2,
    samples: list[Sample],
    held_out: list[Sample],
    store: StoreOptions | None,
    finish: Callable[[], None],
) -> None:
    from florence2.train.trainer import train  # accelerate takes a second, and --check does without

    def after_save(step: int) -> dict[str, Any]:
        if step < settings.steps:
            _plot(options.out)
        return {"evaluation": _measure(f, held_out, stored())} if held_out else {}

    @cache
    def stored() -> StoredImages | None:
        return None if store is None else StoredImages(f, store)

    _say(_describe(f.model, settings))
    need = _say_needs(options, path, settings, f, samples)
    notes = _notes(options, lora, samples)
    encoded = Progress(things="images encoded")

    def show(done: int, total: int) -> None:
        encoded(done, total)
        if done == total:
            encoded.close()

    train(
        f.model,
        f.processor,
        samples,
        settings,
        options.out,
        notes,
        after_save,
        finish=finish,
        store=store,
        need=need,
        say=_say,
        progress=show,
    )


def _describe(model: Florence2Model, settings: TrainSettings) -> str:
    counts = [f"{name}: {trainable:,} of {total:,}" for name, (trainable, total) in count_trainable(model).items()]
    frozen = [name for name, (trainable, _) in count_trainable(model).items() if not trainable]
    end = f" Frozen parts compute without dropout and stochastic depth: {', '.join(frozen)}." if frozen else ""
    return f"{settings.steps} steps of {settings.batch} images. Trainable parameters: {'; '.join(counts)}.{end}"


def _say_needs(
    options: argparse.Namespace, path: Path, settings: TrainSettings, f: Florence2, samples: list[Sample]
) -> RunMemory:
    """Say how much memory and disk the run needs, and return it. Raises OptionError when the disk has less."""
    need = expect_memory(f.model, f.processor, samples, settings, int(os.environ.get("WORLD_SIZE", "1")))
    memory = describe_memory(need)
    if memory is not None:
        _say(memory)
    tensors = [*f.model.parameters(), *f.model.buffers()]
    stored = sum(tensor.numel() for tensor in tensors) * stored_dtype(find_weights(path)).itemsize
    result = need.trained if options.lora is not None else stored
    _say(check_disk(options.out, need.trained, result))
    _say(describe_padding(f.processor, samples, settings, need))
    return need


def _notes(options: argparse.Namespace, lora: LoraSettings | None, samples: list[Sample]) -> dict[str, Any]:
    """Return what a run depends on besides its settings. The digest covers questions and answers, not the images."""
    given = ("data", "images", "validation", "model", "revision", "prepare")
    notes: dict[str, Any] = {name: None if (value := getattr(options, name)) is None else str(value) for name in given}
    questions = json.dumps([(sample.name, sample.pairs) for sample in samples])
    digest = hashlib.sha256(questions.encode()).hexdigest()[:16]
    notes |= {"changes": dict(options.change) or None}
    notes |= {"task_kind": {task.token: task.answer for task in options.task_kind} or None}
    return {**notes, "task": options.task, "questions": digest, "lora": asdict(lora) if lora else None}


def _measure(model: Florence2, held_out: list[Sample], stored: StoredImages | None) -> dict[str, Any]:
    """Return the metrics of `--validation`; progress goes to stderr."""
    with Progress(len(held_out)) as progress:
        return dict(evaluate(model, held_out, progress=progress, stored=stored))


def _plot(folder: Path) -> None:
    from florence2.train.plot import plot_log

    plot_log(folder / "log.jsonl", folder / CURVE)


def _write_result(f: Florence2, options: argparse.Namespace, path: Path, prepare: Prepare | None) -> Path:
    """Write the curve, the adapter or a checkpoint in the layout and type of the one at `path`, and its own tasks."""
    _plot(options.out)
    model = f.model
    if options.lora is not None:
        target: Path = options.out / ADAPTER
        save_adapter(model, target, None if options.lora_names == "canonical" else options.lora_names)
        write_tasks(target, f.processor.tasks)
        return target
    target = options.out / CHECKPOINT
    save_checkpoint(model, target, model.config.layout, stored_dtype(find_weights(path)), prepare)
    copy_companions(checkpoint_folder(path), target)
    write_tasks(target, f.processor.tasks)
    return target
