"""The training loop: StepData -> gradients -> AdamW, with a log, and a state that resumes to the bit.

Several processes or GPUs go through Hugging Face accelerate: start the same command with `accelerate launch`.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from florence2.checkpoints.files import read_json, write_json, written_whole
from florence2.errors import ConfigError, Florence2Error
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train.checkpoints import TrainState, load_state, save_state
from florence2.train.data import Batch, Collate, Samples, StepData, make_batch
from florence2.train.freeze import freeze, set_training
from florence2.train.loss import LossModule
from florence2.train.rematerialise import rematerialised
from florence2.train.schedule import rate_at
from florence2.train.settings import TrainSettings
from florence2.train.stopping import Stop, asked_to_stop, leave_signals_to_the_main_process

LOG, SETTINGS = "log.jsonl", "settings.json"
_FREE = ("save_every", "log_every", "workers")
"""Settings that change nothing of what is learnt."""
_PATIENCE = timedelta(days=1)
"""How long processes wait for the one that evaluates."""


def train(
    model: Florence2Model,
    processor: Processor,
    samples: Samples,
    settings: TrainSettings,
    folder: Path,
    notes: dict[str, Any] | None = None,
    after_save: Callable[[int], dict[str, Any]] | None = None,
    objective: LossModule | None = None,
    collate: Collate = make_batch,
) -> None:
    """Train `model` in place, for as many steps as `settings` say.

    `folder` gets `settings.json` (with `notes`: what else the run depends on), `log.jsonl` and `state.pt`; a folder
    that holds a state is gone on with, from the update after the last one saved, to the very bits of the weights that
    a run without a break would have come to. `after_save(step)`, every `settings.save_every` steps and at the end, may
    return what is to be logged then, such as an evaluation; one that was broken off is made up for. `objective` around
    the model may compute another loss, with parameters of its own that are trained too, from the batches that
    `collate` makes.

    Raises KeyboardInterrupt when Ctrl-C or SIGTERM asked for it, behind the update under way, which is saved; and
    ConfigError when `folder` holds the state of a run with other settings, or when the gradient is no longer finite:
    what was saved before stays as it is.
    """
    accelerator = Accelerator(
        mixed_precision="no",  # one process cannot change accelerate's; see `_update`
        cpu=model.device.type == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    data = StepData(
        samples,
        processor,
        settings,
        model.config.text.max_position_embeddings,
        accelerator.process_index,
        accelerator.num_processes,
        collate,
    )
    objective = (objective or LossModule(model)).train()
    freeze(model, settings.freeze)
    optimizer = make_optimizer(objective, settings)
    folder.mkdir(parents=True, exist_ok=True)
    state = load_state(folder)
    first = 0 if state is None else state.step
    _hold_settings(folder, {**asdict(settings), **(notes or {})}, state is not None, accelerator)
    if state is not None:
        _restore(objective, optimizer, state)
    module, optimizer = accelerator.prepare(objective, optimizer)
    _check_same_step(first, folder, accelerator)
    log = _Log(folder, settings, first, accelerator.is_main_process)
    if accelerator.num_processes > 1 and accelerator.is_main_process:  # a launcher may have started others than meant
        print(f"{accelerator.num_processes} processes share each batch.", file=sys.stderr)
    if first and accelerator.is_main_process:
        print(f"{folder} goes on behind step {first} of {settings.steps}.", file=sys.stderr)

    def save(step: int) -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            save_state(folder, _capture(objective, optimizer, step))

    def follow(step: int, stop: Stop) -> None:
        if accelerator.is_main_process and after_save is not None:
            with stop.at_once():
                row = after_save(step)
            if row:
                log.write({"step": step, **row})
            set_training(model)

    try:
        with (
            rematerialised(model, settings.gradient_checkpointing),
            asked_to_stop(tell=accelerator.is_main_process) as stop,
        ):
            if first and _is_due(first, settings) and not log.has_more_of(first):
                follow(first, stop)
            for step, batches in zip(range(first + 1, settings.steps + 1), _load(data, first), strict=True):
                loss, norm, labels = _update(module, optimizer, batches, step - 1, settings, accelerator)
                log.step(step - 1, loss, norm, labels)
                stopping = _any_process(stop.asked, accelerator)
                if stopping or _is_due(step, settings):
                    save(step)
                if stopping:
                    raise KeyboardInterrupt
                if _is_due(step, settings):
                    follow(step, stop)
    finally:
        log.close()
    model.eval()


def _is_due(step: int, settings: TrainSettings) -> bool:
    return step == settings.steps or step % settings.save_every == 0


def is_first_process() -> bool:
    """Whether this is the one of several processes that writes results, or the only one."""
    return bool(PartialState().is_main_process)


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over what is trainable; only matrices and kernels decay, neither biases, norms nor embeddings."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 and "embed" not in name and "shared" not in name
            (decayed if matrix else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)


def _update(
    module: nn.Module,
    optimizer: Any,
    batches: Sequence[Batch],
    step: int,
    settings: TrainSettings,
    accelerator: Accelerator,
) -> tuple[float, float, int]:
    """One update; returns the mean loss of a label, the gradient's norm before clipping, and the labels seen.

    Every label of the whole batch weighs the same, however it is cut into micro-batches and processes.
    """
    # dropout then depends on the step alone, so that a resumed run draws what an unbroken one would
    torch.manual_seed(settings.seed * 1_000_003 + step * accelerator.num_processes + accelerator.process_index)
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step, settings)
    device = accelerator.device
    own = torch.tensor(sum(batch.num_labels for batch in batches), device=device)
    labels = accelerator.reduce(own, reduction="sum")
    total = torch.zeros((), device=device)
    for number, batch in enumerate(batches):
        last = number + 1 == len(batches)
        with nullcontext() if last else accelerator.no_sync(module):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                loss = module(batch.to(device))
            # the processes' gradients are averaged, not added
            accelerator.backward(loss * (accelerator.num_processes / labels))
        total += loss.detach()
    norm = float(accelerator.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], settings.clip))
    mean = float(accelerator.reduce(total, reduction="sum") / labels)
    if not math.isfinite(norm + mean):  # before it gets into the weights, and with them into the state
        raise ConfigError(
            f"At step {step + 1} the loss is {mean} and the norm of its gradient {norm}. Try a lower --learning-rate, "
            "more --warmup, or float32."
        )
    optimizer.step()
    optimizer.zero_grad()
    return mean, norm, int(labels)


def _load(data: StepData, first: int) -> Iterator[list[Batch]]:
    """The steps' batches from `first` on, made ahead by worker processes."""
    workers = data.settings.workers
    loader = DataLoader(
        _Told(data),
        batch_size=None,
        sampler=range(first, len(data)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_be_a_worker,
    )
    for batches in loader:
        if isinstance(batches, Florence2Error):
            raise batches
        yield batches


class _Told(Dataset[list[Batch] | Florence2Error]):
    """`data`, with errors handed over as values: what a worker process raises comes out as its traceback."""

    def __init__(self, data: StepData):
        self.data = data

    def __getitem__(self, step: int) -> list[Batch] | Florence2Error:
        try:
            return self.data[step]
        except Florence2Error as error:
            return error


def _be_a_worker(_: int) -> None:
    """One thread, and stopping is the main process's business."""
    torch.set_num_threads(1)
    leave_signals_to_the_main_process()


def _capture(module: nn.Module, optimizer: Any, step: int) -> TrainState:
    learnt = {name: p.detach().cpu().clone() for name, p in module.named_parameters() if p.requires_grad}
    return TrainState(step, learnt, optimizer.state_dict())


def _restore(module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    parameters: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if parameters.keys() != state.parameters.keys():
        raise ConfigError("The saved state trains other parameters than this run would; use another folder.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.parameters[name])
    optimizer.load_state_dict(state.optimizer)


def _hold_settings(folder: Path, values: dict[str, Any], begun: bool, accelerator: Accelerator) -> None:
    """Write the run's settings; of a run that has `begun`, only what its weights do not depend on may be new."""
    path = folder / SETTINGS
    values = json.loads(json.dumps(values))
    if begun and path.is_file():
        found = read_json(path)
        other = sorted(key for key in values.keys() | found.keys() if values.get(key) != found.get(key))
        other = [key for key in other if key not in _FREE]
        if other:
            listing = ", ".join(f"{key} {found.get(key)!r}, not {values.get(key)!r}" for key in other)
            raise ConfigError(f"{folder} was begun with {listing}; use those, or another folder.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(path, values)


def _any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether one of them has raised the flag; all of them come to the same answer."""
    return bool(accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), reduction="sum"))


def _check_same_step(first: int, folder: Path, accelerator: Accelerator) -> None:
    """Every process must have found the same state, which it reads from the folder itself."""
    steps = accelerator.gather(torch.tensor([first], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ConfigError(
            f"The processes would go on from steps {steps}: {folder} must be one folder that all machines share."
        )


class _Log:
    """`log.jsonl`, and a line for people now and then."""

    def __init__(self, folder: Path, settings: TrainSettings, first: int, active: bool):
        self.folder, self.settings, self.first, self.active = folder, settings, first, active
        self.losses: list[tuple[float, int]] = []
        self.start = time.monotonic()
        self.file = None
        if active:
            _drop_after(folder / LOG, first)
            self.file = (folder / LOG).open("a", encoding="utf-8")

    def step(self, step: int, loss: float, norm: float, labels: int) -> None:
        self.losses.append((loss, labels))
        done, settings = step + 1, self.settings
        if done % settings.log_every and done != settings.steps:
            return
        count = sum(n for _, n in self.losses)
        mean = sum(loss * n for loss, n in self.losses) / count
        self.losses.clear()
        seconds = time.monotonic() - self.start
        rate = (done - self.first) / seconds
        left = (settings.steps - done) / rate
        lr = rate_at(step, settings)
        self.write({"step": done, "loss": mean, "norm": norm, "learning_rate": lr, "seconds": round(seconds, 1)})
        if self.active:
            line = f"step {done} of {settings.steps}  loss {mean:.4f}  rate {lr:.2e}  {rate:.2f} steps/s  "
            print(line + f"{_clock(left)} left", file=sys.stderr, flush=True)

    def has_more_of(self, step: int) -> bool:
        """Whether something else than its loss was written of a step."""
        if not self.active:
            return False
        rows = map(json.loads, (self.folder / LOG).read_text(encoding="utf-8").splitlines())
        return any(row["step"] == step and "loss" not in row for row in rows)

    def write(self, row: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _drop_after(path: Path, step: int) -> None:
    """Of a broken run's log, keep what the saved state has seen."""
    if path.is_file():
        rows = path.read_text(encoding="utf-8").split("\n")[:-1]  # a kill may leave half a row, without its end
        kept = [row for row in rows if json.loads(row)["step"] <= step]
        with written_whole(path) as draft:
            draft.write_text("".join(f"{row}\n" for row in kept), encoding="utf-8")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
