"""Measure how fast a machine is, and count the work of a model: the two sides of a utilisation figure."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engines import synchronise
from florence2.fast.linear import linear
from florence2.model.config import Florence2Config
from florence2.model.florence2 import Florence2Model


@dataclass(frozen=True)
class Rates:
    """The limits of a machine: FLOP/s of the vision tower's matrix products, and bytes/s read from RAM."""

    products: float
    reading: float


def measure_rates(config: Florence2Config, size: tuple[int, int], device: str, dtype: torch.dtype) -> Rates:
    """Measure both limits. Each product is timed with torch's routine and with ours; the faster one counts."""
    flops = seconds = 0.0
    with torch.inference_mode():
        for rows, inner, outer, times in _vision_products(config, size):
            x, w = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(outer, inner, device=device)
            w = w.to(dtype)
            best = min(_median(partial(product, x, w), device) for product in (F.linear, linear))
            flops += times * 2.0 * rows * inner * outer
            seconds += times * best
        block = torch.ones(2**27, device=device)  # 512 MB, larger than any cache
        reading = block.nbytes / _median(block.sum, device)
    return Rates(flops / seconds, reading)


def count_vision_flops(config: Florence2Config, size: tuple[int, int]) -> float:
    """Count the FLOPs from one image of (height, width) pixels to image tokens; a multiply-add counts as two."""
    model = Florence2Model(config).to("meta")
    with FlopCounterMode(display=False) as counter:
        model.encode_image(torch.empty(1, 3, *size, device="meta"))
    return float(counter.get_total_flops())


def count_step_bytes(config: Florence2Config, memory_length: int, dtype: torch.dtype) -> float:
    """Count the bytes that a decoder step for one image must read: weights, and the memory's keys and values."""
    with torch.device("meta"):
        text = Florence2Model(config).language_model
    projections = ("encoder_attn.k_proj", "encoder_attn.v_proj")  # run once per memory, not in a step
    weights = [
        p.numel() for name, p in text.decoder.named_parameters() if not any(part in name for part in projections)
    ]
    table = sum(p.numel() for name, p in text.decoder.named_parameters() if "embed_positions" in name)
    memory = 2 * config.text.decoder_layers * memory_length * config.text.d_model
    return float((sum(weights) - table + text.shared.weight.numel() + memory) * dtype.itemsize)


def describe_machine(threads: int | None = None) -> str:
    """Describe the processor, torch, Python and this checkout in one line, for the head of a results file."""
    model = platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        lines = [line.split(":")[1].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")]
        model = f"{lines[0]}, {len(lines)} cores" if lines else model
    if torch.cuda.is_available():
        model += f", {torch.cuda.get_device_name()}"
    return (
        f"{model} ({torch.backends.cpu.get_cpu_capability()}), {threads or torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{name_checkout(Path(__file__).parent.parent)}"
    )


def name_checkout(checkout: Path) -> str:
    """Name the commit of a checkout, and whether it holds more than that; the folder where git does not know it."""
    head = _git(checkout, "rev-parse", "--short", "HEAD")
    if head is None:
        return f"the folder {checkout.name}"
    return f"commit {head}" + (" with changes" if _git(checkout, "status", "--porcelain", "-uno") else "")


def _git(checkout: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _vision_products(config: Florence2Config, size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (rows, inner, outer, how often) for every linear map of the vision tower."""
    vision = config.vision
    height, width = size
    for stage, channels in enumerate(vision.dim_embed):
        height, width = (-(-side // vision.patch_stride[stage]) for side in (height, width))
        blocks, hidden = 2 * vision.depths[stage], int(channels * vision.mlp_ratio)
        for inner, outer in ((channels, 3 * channels), (channels, channels), (channels, hidden), (hidden, channels)):
            yield height * width, inner, outer, blocks


def _median(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
