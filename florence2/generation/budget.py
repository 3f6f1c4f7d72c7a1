"""Estimate the bytes that a generation or an image takes before they are taken, and how many fit."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.inputs.coordinates import NUM_BINS
from florence2.model.config import Florence2Config, VisionConfig
from florence2.model.florence2 import Florence2Model

USABLE = 0.9  # of the free bytes: the allocator cannot use every one
_MACHINE, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")  # where Linux says what is free
_COPIES = 4  # of the logits, and of the encoder's widest layer, that exist at one moment
_VISION_COPIES = 20  # of the largest stage: stream, windows, queries, keys, values, weights, and the MLP's hidden layer
_PUBLISHED_RATIO = 4.0  # of the MLP that these copies count


@runtime_checkable
class PlansAnswers(Protocol):
    """A model whose faster ways take other bytes than `generation_bytes`."""

    def answer_bytes(self, options: GenerationOptions, memory_length: int) -> int:
        """Estimate what `answer_bytes` estimates."""
        ...


def answer_bytes(model: Florence2Model, options: GenerationOptions, memory_length: int) -> int:
    """Estimate the bytes that encoding and answering one prompt take at most, by the way that `model` goes."""
    if isinstance(model, PlansAnswers):
        return model.answer_bytes(options, memory_length)
    return generation_bytes(model.config, options, memory_length, model.dtype)


def generation_bytes(
    config: Florence2Config, options: GenerationOptions, memory_length: int, dtype: torch.dtype
) -> int:
    """Estimate the bytes that encoding and answering one prompt take at most, without the weights and the image.

    `memory_length` is the number of image tokens and prompt ids together. The sum counts the encoder's widest layer,
    the keys and values of memory and answer, the search's sequences and the logits, with the answer at its limit, and
    for a confidence the memory itself and the locations' probabilities along the answer.
    """
    text, beams = config.text, options.width
    limit = min(options.max_new_tokens, text.max_position_embeddings)
    encoder = _COPIES * memory_length * (text.encoder_ffn_dim + text.d_model)
    keys_values = 2 * text.decoder_layers * text.d_model * (memory_length + limit * beams)
    ancestry = 2 * beams * beams * limit  # bytes, while beams are reordered
    search = 6 * beams * limit * (8 + 4)  # running, candidates and finished: ids and log-probabilities
    logits = _COPIES * beams * text.vocab_size * 4
    kept = memory_length * text.d_model * dtype.itemsize + options.num_return_sequences * limit * NUM_BINS * 4
    confidence = kept if options.confidence else 0
    return (encoder + keys_values) * dtype.itemsize + ancestry + search + logits + confidence


def vision_bytes(config: VisionConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """Estimate the bytes that the vision tower takes at most for one image of `height` x `width` pixels.

    Its weights are not counted. The largest stage, as a rule the first, decides.
    """
    largest = 0
    strides = zip(config.patch_size, config.patch_stride, config.patch_padding, strict=True)
    for channels, (size, stride, padding) in zip(config.dim_embed, strides, strict=True):
        height, width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
        largest = max(largest, height * width * channels)
    copies = _VISION_COPIES + 2 * max(0.0, config.mlp_ratio - _PUBLISHED_RATIO)
    return int(copies * largest) * dtype.itemsize


def images_that_fit(each: int, device: torch.device, most: int, share: float) -> int:
    """Return how many images of `each` bytes go into `share` of the free bytes: at least 1, at most `most`."""
    free = free_bytes(device) if most > 1 else None
    return most if free is None else max(1, min(most, int(share * free // max(1, each))))


def how_many_fit(each: int, device: torch.device) -> int:
    """Return how many answers of `each` bytes fit now. Raises OptionError when not even one does."""
    free = free_bytes(device)
    if free is None:
        return 1 << 30
    if each > USABLE * free:
        raise OptionError(
            f"One answer may take {_gigabytes(each)} GB in addition to the weights, but {device} has only "
            f"{free / 1e9:.1f} GB free; lower max_new_tokens or num_beams, or free some memory."
        )
    return int(USABLE * free // each)


def _gigabytes(size: int) -> str:
    """Return bytes as gigabytes; settings without a limit can ask for more than a float holds."""
    return f"{size / 1e9:.1f}" if size < 10**18 else "more than 1,000,000,000"


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on `device`; None where that cannot be known."""
    if device.type == "cuda":
        return _free_of_cuda(device)
    if device.type != "cpu":
        return None
    known = [free for free in (_free_of_machine(), _free_of_group()) if free is not None]
    return min(known) if known else None


def _free_of_cuda(device: torch.device) -> int:
    """Return what the driver has free, and what torch holds idle, but not in the pools of recorded graphs."""
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    if free > total / 4:  # enough: to count what is idle takes milliseconds
        return free
    idle = sum(
        segment["total_size"] - segment["active_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == index and tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
    )
    return int(free + idle)


def _free_of_machine() -> int | None:
    try:
        lines = _MACHINE.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_group() -> int | None:
    """Return the free bytes under the container's limit, if any; page cache is reclaimable, so it counts as free."""
    try:
        limit = int((_GROUP / "memory.max").read_text())  # "max" where there is none
        used = int((_GROUP / "memory.current").read_text())
        rows = (_GROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    files = next((int(row.split()[1]) for row in rows if row.startswith("file ")), 0)
    return max(0, limit - used + files)
