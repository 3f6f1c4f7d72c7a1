"""The training loop: StepData -> gradients -> AdamW, with a log, and a state that resumes to the bit.

Hugging Face accelerate runs it on several processes or GPUs: start the same command with `accelerate launch`.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from torch import nn

from florence2.errors import ConfigError
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train.checkpoints import TrainState, capture_state, load_state, restore_state, save_state
from florence2.train.compiling import compiled_layers
from florence2.train.data import Batch, Collate, StepData, make_batch
from florence2.train.freeze import freeze, set_training
from florence2.train.gradient_checkpointing import gradient_checkpointing
from florence2.train.loader import load_steps
from florence2.train.loss import LossModule
from florence2.train.needs import RunMemory, expect_memory, free_memory, update_or_explain
from florence2.train.run_folder import any_process, be_quiet, check_same_step, keep_settings, lock_folder
from florence2.train.run_log import LOG as LOG
from florence2.train.run_log import RunLog
from florence2.train.samples import Samples
from florence2.train.schedule import rate_at
from florence2.train.settings import TrainSettings
from florence2.train.stopping import StopRequest, catch_stop_signals
from florence2.train.store.filling import StoreOptions
from florence2.train.store.running import fill_for_run
from florence2.train.store.tower import is_frozen

_PATIENCE = timedelta(days=1)
"""The longest time that the other processes wait while one evaluates."""

AfterSave = Callable[[int], dict[str, Any]]
AfterUpdate = Callable[[int, float], None]


def train(
    model: Florence2Model,
    processor: Processor,
    samples: Samples,
    settings: TrainSettings,
    folder: Path,
    notes: dict[str, Any] | None = None,
    after_save: AfterSave | None = None,
    objective: LossModule | None = None,
    collate: Collate = make_batch,
    finish: Callable[[], None] | None = None,
    after_update: AfterUpdate | None = None,
    store: StoreOptions | None = None,
    need: RunMemory | None = None,
    say: Callable[[str], None] = be_quiet,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train `model` in place for `settings.steps` updates, or resume the run in `folder`.

    A resumed run starts after the last saved update and ends with the same bits as an uninterrupted one.

    Args:
        model: The model. `settings.freeze` names the parts that do not train.
        processor: Turns images, prompts and answers into tensors.
        samples: The training data, at least one batch of them.
        settings: Everything that the updates depend on besides data and model.
        folder: Gets `settings.json`, `log.jsonl` and `state.pt`.
        notes: What else the run depends on, kept in `settings.json`.
        after_save: Called with the step after every save; returns what to log, such as an evaluation. A resumed run
            repeats a call that was interrupted.
        objective: A loss module around `model` with its own loss, and possibly parameters that are trained too.
        collate: Makes a batch of samples, as `make_batch` does.
        finish: Called after the last update, with the model in eval mode, in the process that writes results. No other
            run can write to `folder` until it returns.
        after_update: Called after every update with its number, counted from 1, and the mean loss before it.
        store: Where the outputs of a frozen vision tower are kept: every image is encoded once, before the first
            update. None encodes it in every epoch. It needs `samples` whose images stay the same, and the default
            loss and batches.
        need: What `expect_memory` gave for this run; None estimates it where it is wanted.
        say: Called with lines for people, in the process that writes: the loss, the time left, what was found.
        progress: Called as `progress(done, total)` while images are encoded for the store.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the update under way was finished and saved.
        ConfigError: `folder` holds a run with other settings, or the gradient is not finite. Saved files stay. Or a
            `store` cannot be used with this model, loss or `collate`.
        OptionError: Another run writes to `folder`, or it cannot be written.
    """
    accelerator = Accelerator(
        mixed_precision="no",  # accelerate fixes the precision for the whole process; `_Run._loss` sets it per run
        cpu=model.device.type == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    positions = model.config.text.max_position_embeddings
    rank, processes = accelerator.process_index, accelerator.num_processes
    data = StepData(samples, processor, settings, positions, rank, processes, collate)
    own = objective is not None or collate is not make_batch
    objective = (objective or LossModule(model)).train()
    freeze(model, settings.freeze)
    if store is not None and (own or settings.varies_images or not is_frozen(model)):
        raise ConfigError(
            "The outputs of the vision tower can be stored only where it is frozen, with the default loss and batches, "
            "and images that do not vary. Freeze it, or leave the store out."
        )
    run = _Run(model, objective, settings, folder, accelerator, after_save, say)
    with lock_folder(folder, accelerator, say):
        run.open({**asdict(settings), **(notes or {}), **({} if store is None else {"store": True})})
        try:
            if store is not None and run.first < settings.steps:
                with lock_folder(store.folder, accelerator, say):
                    data.collate = fill_for_run(model, data, run.first, store, accelerator, say, progress)
                run.log.restart_clock()
            _train_steps(run, data, after_update, need)
        finally:
            run.log.close()
        model.eval()
        if finish is not None and is_first_process():
            finish()


def _train_steps(run: "_Run", data: StepData, after_update: AfterUpdate | None, need: RunMemory | None) -> None:
    """Make the updates that are left."""
    settings, free = run.settings, free_memory(run.model.device)

    @cache
    def memory() -> RunMemory:
        return need or expect_memory(run.model, data.processor, data.samples, settings, data.processes)

    recomputed = memory().recomputed() if settings.gradient_checkpointing else None
    with (
        compiled_layers(run.model, settings.compile),
        gradient_checkpointing(run.model, settings.gradient_checkpointing, recomputed),
        catch_stop_signals(announce=run.accelerator.is_main_process and run.say is not be_quiet) as stop,
    ):
        run.make_up_evaluation(stop)
        for step, batches in zip(range(run.first + 1, settings.steps + 1), load_steps(data, run.first), strict=True):
            loss = update_or_explain(partial(run.update, step - 1, batches), step, free, memory)
            run.log.say_epoch(step, len(data.samples) // settings.batch)
            if after_update is not None:
                after_update(step, loss)
            run.save_and_evaluate(step, stop)


def is_first_process() -> bool:
    """Return whether this process is the one that writes results."""
    return bool(PartialState().is_main_process)


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Make AdamW for the trainable parameters; only matrices and kernels decay, not biases, norms or embeddings."""
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
    # one pass over the parameters instead of about ten
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


class _Run:
    """One process's share of a run: what it trains, the state on disk, and the log."""

    log: RunLog

    def __init__(
        self,
        model: Florence2Model,
        objective: LossModule,
        settings: TrainSettings,
        folder: Path,
        accelerator: Accelerator,
        after_save: AfterSave | None,
        say: Callable[[str], None],
    ):
        self.model, self.settings, self.folder, self.accelerator = model, settings, folder, accelerator
        self.objective, self.module, self.after_save, self.say = objective, objective, after_save, say
        self.optimizer: Any = make_optimizer(objective, settings)
        self.first = 0
        """The number of updates that an earlier run has made and saved."""

    def open(self, values: dict[str, Any]) -> None:
        """Resume the run that the folder holds, or begin one; `values` are all its settings."""
        state = load_state(self.folder)
        keep_settings(self.folder, values, state is not None, self.accelerator)
        if state is not None:
            self._resume(state)
        self.module, self.optimizer = self.accelerator.prepare(self.objective, self.optimizer)
        check_same_step(self.first, self.folder, self.accelerator)
        self.log = RunLog(self.folder, self.settings, self.first, self.accelerator.is_main_process, self.say)
        self._announce()

    def _resume(self, state: TrainState) -> None:
        if state.step > self.settings.steps:
            raise ConfigError(
                f"{self.folder} holds a state after step {state.step}, but this run ends at step "
                f"{self.settings.steps}. Use another folder."
            )
        restore_state(self.objective, self.optimizer, state)
        self.first = state.step

    def _announce(self) -> None:
        if not self.accelerator.is_main_process:
            return
        if self.accelerator.num_processes > 1:  # a launcher may start another number than intended
            self.say(f"{self.accelerator.num_processes} processes share each batch.")
        if self.first:
            self.say(f"Resuming run after step {self.first} of {self.settings.steps}.")

    def update(self, step: int, batches: Sequence[Batch]) -> float:
        """Make one update, log it and return its mean loss; `step` counts from 0.

        Every label of the whole batch weighs the same, however it is cut into micro-batches and processes.
        """
        self._prepare_update(step)
        accelerator = self.accelerator
        own = torch.tensor(sum(batch.num_labels for batch in batches), device=accelerator.device)
        labels = accelerator.reduce(own, reduction="sum")
        total = self._accumulate(batches, labels)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        norm = float(accelerator.clip_grad_norm_(trained, self.settings.clip))
        mean = float(accelerator.reduce(total, reduction="sum") / labels)
        if not math.isfinite(norm + mean):  # checked before it reaches the weights, and with them the saved state
            raise ConfigError(
                f"At step {step + 1} the loss is {mean} and the norm of its gradient {norm}. Try a lower "
                "--learning-rate, more --warmup, or float32."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.log.step(step, mean, norm, int(labels))
        return mean

    def _prepare_update(self, step: int) -> None:
        """Set the random state and the learning rate of a step."""
        # dropout depends on the step alone, so a resumed run draws what an uninterrupted one would
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        torch.manual_seed(self.settings.seed * 1_000_003 + step * processes + rank)
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(step, self.settings)

    def _accumulate(self, batches: Sequence[Batch], labels: torch.Tensor) -> torch.Tensor:
        """Add up the gradients of the micro-batches; return the sum of this process's losses."""
        accelerator = self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(batches):
            last = index + 1 == len(batches)
            with nullcontext() if last else accelerator.no_sync(self.module):
                loss = self._loss(batch)
                # the processes' gradients are averaged, not added
                accelerator.backward(loss * (accelerator.num_processes / labels))
            total += loss.detach()
        return total

    def _loss(self, batch: Batch) -> torch.Tensor:
        device = self.accelerator.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            loss: torch.Tensor = self.module(batch.to(device))
        return loss

    def save_and_evaluate(self, step: int, stop: StopRequest) -> None:
        """After `step` updates, save and evaluate if they are due; save and stop if any process was asked to stop."""
        stopping, due = any_process(stop.received, self.accelerator), self._is_due(step)
        if stopping or due:
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                save_state(self.folder, capture_state(self.objective, self.optimizer, step))
        if stopping:
            raise KeyboardInterrupt
        if due:
            self._evaluate(step, stop)

    def make_up_evaluation(self, stop: StopRequest) -> None:
        """Evaluate a resumed run's saved state if that is due and was interrupted."""
        if self.first and self._is_due(self.first) and not self.log.has_evaluation(self.first):
            self._evaluate(self.first, stop)

    def _is_due(self, step: int) -> bool:
        return step == self.settings.steps or step % self.settings.save_every == 0

    def _evaluate(self, step: int, stop: StopRequest) -> None:
        if self.accelerator.is_main_process and self.after_save is not None:
            with stop.immediate():
                row = self.after_save(step)
            if row:
                self.log.write({"step": step, **row})
            set_training(self.model)
