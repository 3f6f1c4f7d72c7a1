"""Estimate the bytes that a generation takes before they are taken, and how many fit."""

from pathlib import Path

import torch

from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.inputs.coordinates import NUM_BINS
from florence2.model.config import Florence2Config

USABLE = 0.9  # of the free bytes: the allocator cannot use every one
_MACHINE, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")  # where Linux says what is free
_COPIES = 4  # of the logits, and of the encoder's widest layer, that exist at one moment


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
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free again inside torch
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu":
        return None
    known = [free for free in (_free_of_machine(), _free_of_group()) if free is not None]
    return min(known) if known else None


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
