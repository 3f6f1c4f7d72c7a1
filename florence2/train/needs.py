"""Say which memory and disk a run will need before it takes them, and what would fit where they run out."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from florence2.errors import OptionError
from florence2.generation.budget import USABLE, free_bytes
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train.checkpoints import STATE
from florence2.train.data import StepData
from florence2.train.grouping import count_positions
from florence2.train.memory import BatchShape, UpdateMemory, estimate_update
from florence2.train.samples import Samples
from florence2.train.settings import TrainSettings

_READ = 64
"""How many samples the expected size of a batch is taken from."""
_UPDATES = 8
"""How many updates the share of padding is taken from."""
_MOMENTS = 2
"""AdamW keeps two values for each parameter that trains."""
_LIBRARIES = 100_000_000
"""Bytes on a CPU for code and buffers of torch's libraries, which are loaded in the first update. Measured: 94 MiB."""
_LIMITS = ("can't allocate memory", "out of memory", "could not create a memory object", "could not create a primitive")
"""What torch and oneDNN write in a RuntimeError when memory runs out."""


@dataclass(frozen=True)
class RunMemory:
    """The bytes that a run needs at its peak, by the number of images that it computes at once.

    Args:
        model: On its device, with what does not train frozen.
        settings: Of the run.
        shape: The expected size of a micro-batch.
        processes: How many processes share each batch.
    """

    model: Florence2Model
    settings: TrainSettings
    shape: BatchShape
    processes: int = 1

    @property
    def images(self) -> int:
        """Return how many images are computed at once."""
        return self.shape.images

    @cached_property
    def trained(self) -> int:
        """Return the bytes of the parameters that train."""
        return sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)

    @cached_property
    def update(self) -> UpdateMemory | None:
        """Return the memory of an update; None where it cannot be estimated."""
        return estimate_update(self.model, self.shape, self.settings.precision == "bfloat16")

    def recomputed(self) -> list[str] | None:
        """Return the layers that gradient checkpointing is to recompute; None for all."""
        return None if self.update is None else self.update.worth_recomputing(self._accumulates())

    def peak(self, images: int | None = None) -> int | None:
        """Return the bytes at the peak besides the weights, with `images` at once; None where that is unknown."""
        if self.update is None:
            return None
        update = self.update.scaled(1 if images is None else images / self.images)
        recomputed = (self.recomputed() or ()) if self.settings.gradient_checkpointing else ()
        accumulates = self._accumulates() or (images or self.images) < self.images
        libraries = _LIBRARIES if self.model.device.type == "cpu" else 0
        return libraries + _MOMENTS * self.trained + update.peak(recomputed, accumulates)

    def that_fit(self, free: int) -> int:
        """Return the most images at once, fewer than now, whose peak is well within `free` bytes; 0 for none."""
        safe = USABLE * free
        fitting = (images for images in range(self.images - 1, 0, -1) if (self.peak(images) or safe + 1) <= safe)
        return next(fitting, 0)

    def _accumulates(self) -> bool:
        # on a CPU the allocator keeps the memory of gradients between two updates
        share = math.ceil(self.settings.batch / self.processes)
        return self.model.device.type == "cpu" or self.images < share


def expect_memory(
    model: Florence2Model, processor: Processor, samples: Samples, settings: TrainSettings, processes: int = 1
) -> RunMemory:
    """Return the memory that a run needs, from the lengths of some of its samples."""
    images = min(settings.micro_batch or settings.batch, math.ceil(settings.batch / processes))
    some = [samples[i] for i in range(0, len(samples), math.ceil(len(samples) / _READ))]
    pairs = [pair for sample in some for pair in sample.pairs]
    positions = model.config.text.max_position_embeddings
    size = processor.image_config
    shape = BatchShape(
        images=images,
        pairs=max(1, round(images * len(pairs) / len(some))),
        prompt=max(len(processor.prompt(prefix)) for prefix, _ in pairs),
        answer=min(positions, max(len(processor.encode(suffix)) for _, suffix in pairs)),
        height=size.height,
        width=size.width,
    )
    return RunMemory(model, settings, shape, processes)


def describe_memory(need: RunMemory) -> str | None:
    """Return a sentence about the memory of a run, with advice where less is free; None where that is unknown."""
    peak, free, used = need.peak(), free_memory(need.model.device), used_memory(need.model)
    if peak is None:
        return None
    optimizer = _MOMENTS * need.trained
    sentence = (
        f"Memory: about {_gigabytes(used + peak)} at the peak: {_gigabytes(used)} as now, {_gigabytes(optimizer)} for "
        f"the optimizer, and {_gigabytes(peak - optimizer)} for gradients and {_images(need.images)} at once"
    )
    if free is None or peak <= free:
        return f"{sentence}."
    return f"{sentence}, but only {_gigabytes(free)} are free. {_advice(need, free)}"


def used_memory(model: Florence2Model) -> int:
    """Return the bytes that this process has taken on the model's device, the weights at least."""
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated(model.device)
    try:
        rows = Path("/proc/self/status").read_text().splitlines()
        return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return sum(parameter.nbytes for parameter in model.parameters())


def describe_padding(processor: Processor, samples: Samples, settings: TrainSettings, need: RunMemory) -> str:
    """Return a sentence about the padding of the first updates, of one process if there are several."""
    shape, data = need.shape, StepData(samples, processor, settings, need.model.config.text.max_position_embeddings)
    image_tokens = need.model.config.vision.image_tokens(shape.height, shape.width)
    computed = padding = 0
    for step in range(min(_UPDATES, settings.steps)):
        indices = data.indices(step)[:: need.processes]
        for start in range(0, len(indices), need.images):
            pairs = [pair for index in indices[start : start + need.images] for pair in samples[index].pairs]
            prompts = [len(processor.prompt(prefix)) for prefix, _ in pairs]
            answers = [len(processor.encode(suffix)[: data.max_length]) for _, suffix in pairs]
            positions = count_positions(prompts, answers, image_tokens)
            computed, padding = computed + positions[0], padding + positions[1]
    return f"Padding: {padding / computed:.1%} of the positions of the text model."


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on `device`, also under a limit of its address space."""
    free, limit = free_bytes(device), _free_addresses() if device.type == "cpu" else None
    known = [each for each in (free, limit) if each is not None]
    return min(known) if known else None


def _free_addresses() -> int | None:
    """Return the bytes that `ulimit -v` leaves; None without such a limit, or where the system has none."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return None if limit == resource.RLIM_INFINITY else max(0, limit - pages * resource.getpagesize())
    except (ImportError, OSError):
        return None


def check_disk(folder: Path, trained: int, result: int) -> str:
    """Return a sentence about the disk space of a run.

    Args:
        folder: The run's folder, which may not exist yet.
        trained: Bytes of the parameters that train.
        result: Bytes of the checkpoint or adapter.

    Raises:
        OptionError: The disk has less than the run needs.
    """
    state = (1 + _MOMENTS) * trained
    held = (folder / STATE).stat().st_size if (folder / STATE).is_file() else 0
    # a state is written next to the one before, so that a kill leaves one of them
    need = 2 * state + result - min(held, state)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise OptionError(
            f"The run needs {_gigabytes(need)} of disk space in {folder}, but only {_gigabytes(free)} are free. Make "
            "room, choose another folder, or train fewer parameters with --freeze or --lora."
        )
    return f"Disk: {_gigabytes(2 * state)} while the state is saved, and {_gigabytes(result)} for the result."


def update_or_explain(
    update: Callable[[], float], step: int, free: int | None, memory: Callable[[], RunMemory]
) -> float:
    """Return the loss of an update. Raise OptionError when memory runs out in it, with what would fit in `free`."""
    try:
        return update()
    except (RuntimeError, MemoryError) as error:
        if not _is_exhaustion(error):
            raise
    # only here the tensors are free again that the error's traceback held
    need = memory()
    raise OptionError(
        f"Memory ran out in update {step}, with {_images(need.images)} computed at once. {_advice(need, free, True)}"
    )


def _is_exhaustion(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _LIMITS)


def _advice(need: RunMemory, free: int | None, exhausted: bool = False) -> str:
    """Say what would fit in `free` bytes; the present number of images does not where memory is `exhausted`."""
    images = need.images // 2 if free is None or need.update is None else need.that_fit(free)
    if exhausted:  # whatever the estimate says
        images = min(images, need.images // 2)
    if images:
        return (
            f"By estimate --micro-batch {images} fits; it changes neither the batch nor, but for rounding, the result."
        )
    if not need.settings.gradient_checkpointing:
        fewer = RunMemory(need.model, replace(need.settings, gradient_checkpointing=True), need.shape, need.processes)
        images = need.images if free is None else fewer.that_fit(free)
        size = f" --micro-batch {images}" if images and images < need.images else ""
        return f"Give --gradient-checkpointing{size}, or train fewer parameters with --freeze or --lora."
    return "Train fewer parameters with --freeze or --lora, or take a smaller model or another device."


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
