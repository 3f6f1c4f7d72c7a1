"""`python -m benchmarks lite MODEL GRAPHS`: a checkpoint in torch, and the same without torch, from exported graphs.

Stages are timed in one process, in turns, as CPU time of one thread, the least of the rounds. Start-up and memory are
those of a process each, which answers one question with three beams.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import florence2
from benchmarks.machine import describe_machine
from benchmarks.subject import default_image
from florence2.lite import Florence2Lite
from florence2.lite import load as load_lite
from florence2.lite.cache import start_decoder

BEAMS, PAST, TOKENS, BATCH = 3, 20, 20, 8
_START = {
    "torch": "from florence2 import load; load = __import__('functools').partial(load, device='cpu')",
    "lite": "from florence2.lite import load; load = __import__('functools').partial(load, threads=1)",
}
_CHILD = """
import json, sys, time
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
began = time.process_time()
{start}
imported = time.process_time() - began
after_import = status("VmRSS")
f = load(sys.argv[1])
loaded = time.process_time() - began - imported
f.run("<OD>", sys.argv[2], num_beams=3, max_new_tokens={tokens}, min_new_tokens={tokens} - 1)
print(json.dumps([imported, after_import, loaded, status("VmHWM")]))
"""


def main(arguments: list[str]) -> int:
    """Measure, and print or write a table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    image = default_image()
    picture = Path(options.scratch) / "benchmark-lite.png"
    image.save(picture)
    starts = {
        name: [measure_start(name, path, picture) for _ in range(options.starts)]
        for name, path in (("torch", options.model), ("lite", options.graphs))
    }
    picture.unlink()
    stages = measure_stages(florence2.load(options.model, device="cpu"), load_lite(options.graphs, threads=1), options)
    text = _document(stages, starts, arguments)
    if options.output:
        options.output.write_text(text)
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lite", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint")
    parser.add_argument("graphs", type=Path, metavar="GRAPHS", help="the folder of its export")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=2, help="processes of each kind; the least counts (2)")
    parser.add_argument("--scratch", type=Path, default=Path(), help="where the image of the processes is written (.)")
    parser.add_argument("--output", type=Path)
    return parser


def measure_start(name: str, path: Any, picture: Path) -> list[float]:
    """Return CPU seconds of the import, MB after it, CPU seconds of loading, and the most MB over one answer."""
    child = _CHILD.format(start=_START[name], tokens=TOKENS)
    command = [sys.executable, "-c", child, str(path), str(picture)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values: list[float] = json.loads(done.stdout)
    return values


def measure_stages(
    f: florence2.Florence2, lite: Florence2Lite, options: argparse.Namespace
) -> Mapping[str, tuple[float, float]]:
    """Return the least CPU milliseconds of each stage, with torch and without."""
    image = default_image()
    prompt, text = f.processor.prompt("<OD>"), f.model.config.text
    seen = f.encode_image(image)
    pixels, features = f.processor.image(image), seen.features
    prepared, encoded = lite.prepare_image(image), lite.encode_image(image)
    with torch.inference_mode():
        memory = f.model.encode(features, torch.tensor([prompt]))
        cache = f.model.start_cache(memory, BEAMS, PAST + options.rounds + 1)
        decoder = start_decoder(lite._graphs, text, [memory.numpy()])
        ids = torch.full((BEAMS,), text.decoder_start_token_id)
        for _ in range(PAST):
            f.model.step(ids, cache)
            decoder.step(ids.numpy())
        answer: dict[str, Any] = {"num_beams": BEAMS, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS - 1}
        pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "vision tower": (lambda: f.model.encode_image(pixels), lambda: lite._encode(prepared)),
            "encoder": (
                lambda: f.model.encode(features, torch.tensor([prompt])),
                lambda: lite._remember(encoded, prompt),
            ),
            f"step, {BEAMS} beams": (
                lambda: f.model.step(ids, cache),
                lambda: decoder.step(np.full(BEAMS, text.decoder_start_token_id)),
            ),
            f"image and answer of {TOKENS} tokens": (
                lambda: f.run("<OD>", image, **answer),
                lambda: lite.run("<OD>", image, **answer),
            ),
            f"{BATCH} answers of {TOKENS} tokens, image encoded": (
                lambda: f.run_batch([("<OD>", seen)] * BATCH, batch_size=BATCH, **answer),
                lambda: lite.run_batch([("<OD>", encoded)] * BATCH, batch_size=BATCH, **answer),
            ),
            "the same, one after the other": (
                lambda: f.run_batch([("<OD>", seen)] * BATCH, batch_size=1, **answer),
                lambda: lite.run_batch([("<OD>", encoded)] * BATCH, batch_size=1, **answer),
            ),
        }
        return {name: _in_turns(pair, options.rounds) for name, pair in pairs.items()}


def _in_turns(pair: tuple[Callable[[], Any], Callable[[], Any]], rounds: int) -> tuple[float, float]:
    least = [float("inf"), float("inf")]
    for _ in range(rounds):
        for i, work in enumerate(pair):
            began = time.process_time()
            work()
            least[i] = min(least[i], 1000 * (time.process_time() - began))
    return least[0], least[1]


def _document(
    stages: Mapping[str, tuple[float, float]], starts: Mapping[str, list[list[float]]], arguments: list[str]
) -> str:
    least = {name: [min(column) for column in zip(*rows, strict=True)] for name, rows in starts.items()}
    names = ("import, CPU s", "after the import, MB", "loading, CPU s", f"most over an answer of {TOKENS} tokens, MB")
    lines = [
        *(f"| {name}, CPU ms | {one:,.1f} | {other:,.1f} |" for name, (one, other) in stages.items()),
        *(
            f"| {name} | {one:,.2f} | {other:,.2f} |"
            for name, one, other in zip(names, least["torch"], least["lite"], strict=True)
        ),
    ]
    return "\n".join(
        [
            f"Generated by `python -m benchmarks lite {' '.join(arguments)}`.",
            describe_machine(1),
            "",
            "| one thread | torch | florence2.lite |",
            "| --- | --- | --- |",
            *lines,
            "",
        ]
    )
