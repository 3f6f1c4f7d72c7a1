"""Train one engine, one update at a time: `python -m benchmarks.train_worker SPEC`.

`benchmarks.train` starts one process for each engine. SPEC is a JSON object (see `TrainSpec`). For every line on stdin
the process makes one update and prints a JSON object: its loss, and how many seconds it took by the clock and of the
processor, with the images read from their files. After the last update follows the peak memory.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.engines import peak_memory, synchronise

LORA_RANK = 16
Report = Callable[[int, float], None]
"""Called after an update with its number and its loss; waits for the next line."""


@dataclass(frozen=True)
class TrainSpec:
    """One engine's run; `rows` are (image file, prompt, answer), `adapter` is a folder for transformers' LoRA."""

    engine: str
    kind: str
    folder: str
    rows: list[tuple[str, str, str]]
    adapter: str
    steps: int
    batch: int
    learning_rate: float
    vocabulary: int
    gradient_checkpointing: bool = False
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int = 0
    workers: int = 0


class Gate:
    """Waits for a line on stdin before every update, and prints the update's loss and seconds."""

    def __init__(self, steps: int, device: str):
        self.steps, self.device = steps, device
        self.start = self.processor = 0.0

    def wait(self) -> None:
        """Wait for a line."""
        if not sys.stdin.readline():
            raise SystemExit(1)
        self.start, self.processor = time.perf_counter(), time.process_time()

    def report(self, step: int, loss: float) -> None:
        """Print an update, counted from 1, and wait for the next."""
        synchronise(self.device)
        seconds, processor = time.perf_counter() - self.start, time.process_time() - self.processor
        print(json.dumps({"loss": loss, "seconds": seconds, "processor": processor}), flush=True)
        if step < self.steps:
            self.wait()


def train_ours(spec: TrainSpec, report: Report) -> None:
    """Run this project's trainer as `florence2 train` does."""
    from florence2.checkpoints.checkpoint import load_model
    from florence2.processor import Processor
    from florence2.train.lora import LoraSettings, add_lora
    from florence2.train.samples import Sample
    from florence2.train.settings import TrainSettings
    from florence2.train.trainer import train

    folder = Path(spec.folder)
    model = load_model(folder, device=spec.device)
    samples = [Sample(Path(image), ((prompt, answer),)) for image, prompt, answer in spec.rows]
    settings = TrainSettings(
        steps=spec.steps, batch=spec.batch, learning_rate=spec.learning_rate, warmup=0, weight_decay=0.0,
        freeze=("vision",) if spec.kind == "frozen" else (), shuffle=False, save_every=spec.steps + 1,
        precision=spec.precision, workers=spec.workers, gradient_checkpointing=spec.gradient_checkpointing,
    )  # fmt: skip
    if spec.kind == "lora":
        add_lora(model, LoraSettings(LORA_RANK, 2 * LORA_RANK))
    with tempfile.TemporaryDirectory() as scratch:
        train(model, Processor.from_folder(folder), samples, settings, Path(scratch), after_update=report)


def train_native(spec: TrainSpec, report: Report) -> None:
    """Run the usual recipe: transformers' processor as collate, its model, and fused AdamW as its Trainer has."""
    from transformers import AutoProcessor, get_cosine_schedule_with_warmup

    model: Any = _load_native(spec)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, spec.steps)
    processor: Any = AutoProcessor.from_pretrained(spec.folder)  # type: ignore[no-untyped-call]
    batches = _native_batches(spec, processor)
    for step in range(spec.steps):
        inputs = {name: value.to(spec.device) for name, value in next(batches).items()}
        with torch.autocast(spec.device.split(":")[0], torch.bfloat16, enabled=spec.precision == "bfloat16"):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(step + 1, loss.item())


def _load_native(spec: TrainSpec) -> Any:
    from peft import PeftModel
    from transformers import Florence2ForConditionalGeneration

    model: Any = Florence2ForConditionalGeneration.from_pretrained(
        spec.folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    _forbid_extra_ids(model.lm_head, spec.vocabulary)
    model.to(spec.device)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if spec.kind == "frozen":
        model.model.vision_tower.requires_grad_(False)
    if spec.kind == "lora":
        model = PeftModel.from_pretrained(model, spec.adapter, is_trainable=True)
    return model.train()


def _forbid_extra_ids(head: Any, vocabulary: int) -> None:
    """Make the ids impossible that conversion added to the vocabulary, so that they have no share in the loss."""
    bias = torch.zeros(len(head.weight))
    bias[vocabulary:] = -1e4
    head.bias = torch.nn.Parameter(bias, requires_grad=False)


def _native_batches(spec: TrainSpec, processor: Any) -> Iterator[dict[str, Any]]:
    """Yield the batches in the order of the rows; labels of padding are -100, which many public recipes forget."""
    from PIL import Image

    steps_per_epoch = len(spec.rows) // spec.batch
    for step in range(spec.steps):
        first = step % steps_per_epoch * spec.batch
        images, prompts, answers = zip(*spec.rows[first : first + spec.batch], strict=True)
        opened = [Image.open(image).convert("RGB") for image in images]
        inputs = dict(processor(text=list(prompts), images=opened, return_tensors="pt", padding=True))
        labels = processor.tokenizer(list(answers), return_tensors="pt", padding=True)["input_ids"]
        yield inputs | {"labels": labels.masked_fill(labels == processor.tokenizer.pad_token_id, -100)}


def main() -> None:
    """Run the engine that the first argument describes."""
    spec = TrainSpec(**json.loads(sys.argv[1]))
    if spec.threads:
        torch.set_num_threads(spec.threads)
    gate = Gate(spec.steps, spec.device)
    gate.wait()
    (train_ours if spec.engine == "ours" else train_native)(spec, gate.report)
    print(json.dumps({"peak": peak_memory(spec.device)}), flush=True)


if __name__ == "__main__":
    main()
