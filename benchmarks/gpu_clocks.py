"""What `benchmarks.gpu` times: stages, whole answers, prompts of many lengths, a folder of files, another engine."""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import florence2
from benchmarks.engines import CAPTION, FEW, Clocks, Spec, synchronise
from benchmarks.subject import default_image, write_jpegs
from florence2.errors import Florence2Error
from florence2.generation.options import GenerationOptions
from florence2.pipeline import Florence2

TASK, BEAMS = "<CAPTION>", 3
ROOT = Path(__file__).parent.parent
_STEPS = 64  # tokens of the long answer, from which those of the short one are taken off
_WARM = 3  # runs before the first that counts: plain, recorded, replayed
_DIFFERENT = 32  # JPEG files of a folder that differ; the others are copies of them


def exactly(f: Florence2, tokens: int) -> GenerationOptions:
    """Return settings with which every answer has `tokens` tokens."""
    return f.options(num_beams=BEAMS, no_repeat_ngram_size=3, max_new_tokens=tokens, min_new_tokens=tokens - 1)


def time_stages(f: Florence2, images: int, repeats: int) -> dict[str, float]:
    """Return the seconds of vision, encoder, one step, and the whole from prepared images to `CAPTION` tokens.

    Raises Florence2Error when the image tokens are not finite: then no time would mean anything.
    """
    model, device = f.model, f.model.device
    turned = [default_image().rotate(5.0 * i) for i in range(images)]
    prepared = [f.prepare_image(image) for image in turned]
    pixels = torch.cat([f.processor.image(image) for image in turned]).to(device, model.dtype)
    ids = torch.tensor([f.processor.prompt(TASK)] * images, device=device)

    def whole() -> None:
        asked = [(TASK, image) for image in f.encode_images(prepared)]
        f.run_batch(asked, options=exactly(f, CAPTION), batch_size=images)

    with torch.inference_mode():
        features = model.encode_image(pixels)
        if not features.isfinite().all():
            raise Florence2Error(f"The image tokens hold NaN or infinities in {model.dtype}.")
        memory = model.encode(features, ids)
        times = {
            "vision": median_time(lambda: model.encode_image(pixels), device, repeats),
            "encoder": median_time(lambda: model.encode(features, ids), device, repeats),
        }
        few, many = (
            median_time(partial(florence2.generate, model, memory, exactly(f, tokens)), device, repeats)
            for tokens in (FEW, _STEPS)
        )
        times["step"] = (many - few) / (_STEPS - FEW)
    return times | {"whole": median_time(whole, device, repeats)}


def time_lengths(f: Florence2, lengths: int) -> tuple[float, float]:
    """Return the seconds of answers to prompts of 1 to `lengths` words, one by one, and of as many of middle length."""
    image, options = f.encode_image(default_image()), exactly(f, CAPTION)
    mixed = random.Random(0).sample(range(1, lengths + 1), lengths)

    def answer(words: Sequence[int]) -> float:
        synchronise(str(f.model.device))
        started = time.perf_counter()
        for count in words:
            f.run(florence2.FreePrompt("what is here" + " and" * count), image, options=options)
        return time.perf_counter() - started

    middle = [(lengths + 1) // 2] * lengths
    for _ in range(_WARM):
        answer([1, middle[0], lengths])
    answer(mixed)  # so that every bucket is recorded
    return answer(mixed), answer(middle)


def time_files(folder: Path, scratch: Path, count: int, device: str, dtype: str, limit: float) -> dict[str, float]:
    """Run `florence2 run` over `count` JPEG files, for at most `limit` seconds.

    Returns the seconds from the start of the command to its first answer, "start", and "rate", the images a second
    after the first answers.
    """
    images = _write_files(scratch / "jpegs", count)
    words = [TASK, str(images), "--model", str(folder), "--device", device, "--dtype", dtype, "--json"]
    words += ["--beams", str(BEAMS), "--max-new-tokens", str(CAPTION)]
    started, times, errors = time.perf_counter(), list[float](), scratch / "stderr"
    with errors.open("w") as stderr, subprocess.Popen(
        [sys.executable, "-m", "florence2", "run", *words],
        stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, env=_environment(),
    ) as command:  # fmt: skip
        assert command.stdout is not None
        for row in command.stdout:
            if "error" in json.loads(row):
                command.kill()
                raise Florence2Error(f"florence2 run failed on an image: {row[:300]}")
            times.append(time.perf_counter() - started)
            if times[-1] > limit:
                command.kill()
                break
    if len(times) < 2:
        raise Florence2Error(f"florence2 run answered {len(times)} of {count} images: {errors.read_text()[-500:]}")
    first = min(64, len(times) // 2)  # those that are answered together at the start
    return {"start": times[0], "rate": (len(times) - first) / max(times[-1] - times[first - 1], 1e-9)}


def _write_files(folder: Path, count: int) -> Path:
    folder.mkdir()
    different = write_jpegs(default_image(), min(count, _DIFFERENT), folder)
    for i in range(len(different), count):
        shutil.copyfile(different[i % len(different)], folder / f"{i}.jpg")
    return folder


def run_engine(name: str, folder: Path, jpeg: str, device: str, dtype: str, repeats: int) -> Clocks:
    """Run one engine in a process of its own, on one image."""
    spec = Spec(
        engine=name, folder=str(folder), jpegs=[jpeg], device=device, dtype=dtype, beams=BEAMS, tokens=_STEPS,
        repeats=repeats,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engines", json.dumps(asdict(spec))],
        capture_output=True, text=True, cwd=ROOT, env=_environment(),
    )  # fmt: skip
    if done.returncode:
        raise Florence2Error(f"The engine {name} failed: {done.stderr[-1000:]}")
    return Clocks(**json.loads(done.stdout.splitlines()[-1]))


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def median_time(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median of the seconds of `work`, with the device idle before and after, warmed up."""
    return statistics.median(_times(work, str(device), repeats))


def _times(work: Callable[[], object], device: str, repeats: int) -> Iterator[float]:
    for _ in range(_WARM if device.startswith("cuda") else 1):
        work()
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        yield time.perf_counter() - started
