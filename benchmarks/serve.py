"""Measure the server: throughput, what HTTP adds, latency under load, and an overload.

`python -m benchmarks serve [PART ...]`. Every figure but `alone` compares two servers in one run: the default one, and
the naive one with --max-batch 1 --cache-mb 0, which answers one request at a time and encodes every image.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

import florence2
from benchmarks.subject import make_synthetic_checkpoint
from recipes.nano.scenes import make_scene
from tests.serve.server import RunningServer, encode, native_body, png, serving

TASKS = ("<OD>", "<CAPTION>", "<OCR>", "<DENSE_REGION_CAPTION>")
_ALONE = 100  # requests of `alone`
NAIVE = ("--max-batch", "1", "--cache-mb", "0", "--max-queue", "100000", "--deadline", "600")


def main(arguments: Sequence[str]) -> int:
    """Measure the parts that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serve", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--model", default="nano", help="nano, or base with synthetic weights")
    parser.add_argument("--requests", type=int, default=96, help="of each throughput (default: 96)")
    parser.add_argument("--rounds", type=int, default=3, help="of each throughput; the median counts (default: 3)")
    parser.add_argument("--clients", type=int, default=16, help="that ask at once (default: 16)")
    parser.add_argument("--seconds", type=float, default=60, help="of latency and overload (default: 60)")
    parser.add_argument("--max-new-tokens", type=int, help="of every answer (default: as the model ends it)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in options.parts or PARTS:
            print(f"{name}: {PARTS[name](bench)}", flush=True)
    return 0


class Bench:
    """The model, the images and the load of one run."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        """Make what all parts share."""
        self.options, self.folder, self._seed = options, folder, 0
        self.model = options.model
        if options.model != "nano":
            self.model = str(make_synthetic_checkpoint(options.model, folder))
        self._settings = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}

    @contextmanager
    def server(self, *words: str) -> Iterator[RunningServer]:
        """Start a server."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        with serving(folder, *words, model=self.model) as server:
            yield server

    def images(self, count: int, photos: bool = False) -> list[bytes]:
        """Return the bytes of images that no server has seen; `photos` have the size, and the noise, of photographs."""
        self._seed += count
        scenes = (make_scene(7, self._seed + i).image.convert("RGB") for i in range(count))
        if photos:
            return [encode(_with_noise(scene.resize((1500, 1000)), self._seed), "JPEG") for scene in scenes]
        return [encode(scene.resize((320, 240)), "JPEG") for scene in scenes]

    def ask(self, server: RunningServer, image: bytes, task: str, **options: Any) -> float:
        """Ask once; return the seconds, or minus the status where there was no answer."""
        body, started = native_body(image, task, options={**self._settings, **options}), time.perf_counter()
        status = server.post("/v1/florence2", body).status
        return time.perf_counter() - started if status == 200 else -status

    def rate(self, server: RunningServer, asked: Sequence[tuple[bytes, str]]) -> float:
        """Return the answers a second of clients that each wait for their answer."""
        with ThreadPoolExecutor(self.options.clients) as clients:
            started = time.perf_counter()
            took = list(clients.map(lambda each: self.ask(server, *each), asked))
            seconds = time.perf_counter() - started
        assert min(took) > 0, min(took)
        return len(asked) / seconds


def _both(bench: Bench, load: Callable[[], Sequence[tuple[bytes, str]]]) -> str:
    """Compare the rates of both servers, in turns, on loads of one kind: a second, and a second of the CPU."""
    with bench.server("--deadline", "600") as ours, bench.server(*NAIVE) as naive:
        found: dict[int, list[tuple[float, float]]] = {ours.port: [], naive.port: []}
        for server in (ours, naive):
            bench.ask(server, bench.images(1)[0], "<OD>")
        for _ in range(bench.options.rounds):
            for server in (ours, naive):
                asked, before = load(), _cpu_seconds(server)
                rate = bench.rate(server, asked)
                found[server.port].append((rate, len(asked) / (_cpu_seconds(server) - before)))
    walls = [statistics.median(wall for wall, _ in each) for each in found.values()]
    cpus = [statistics.median(cpu for _, cpu in each) for each in found.values()]
    return (
        f"{walls[0]:.2f} answers/s, naive {walls[1]:.2f}: {walls[0] / walls[1]:.2f} times; {cpus[0]:.2f} answers a "
        f"second of the CPU, naive {cpus[1]:.2f}: {cpus[0] / cpus[1]:.2f} times ({bench.options.rounds} rounds)"
    )


def _cpu_seconds(server: RunningServer) -> float:
    """Return the CPU time of a server so far; on a machine that others use, it says more than the clock."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def distinct(bench: Bench) -> str:
    """Measure clients whose images all differ, with four tasks mixed (S2)."""
    count = bench.options.requests

    def load() -> list[tuple[bytes, str]]:
        return [(image, TASKS[i % len(TASKS)]) for i, image in enumerate(bench.images(count))]

    return _both(bench, load)


def repeated(bench: Bench) -> str:
    """Measure clients that ask four tasks about each image (S3)."""
    count = max(1, bench.options.requests // len(TASKS))
    return _both(bench, lambda: [(image, task) for image in bench.images(count) for task in TASKS])


def alone(bench: Bench) -> str:
    """Measure how much HTTP adds to `f.run`, one request at a time, with a JPEG of about 300 kB (S4)."""
    model = florence2.load(bench.model, device="cpu")
    settings: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 8}
    added, direct_cpu = [], 0.0
    with bench.server() as server:
        images = bench.images(_ALONE + 3, photos=True)
        for _ in range(3):
            bench.ask(server, warm := images.pop(), "<CAPTION>", **settings)
            model.run("<CAPTION>", warm, **settings)
        server_cpu = -_cpu_seconds(server)
        for image in images:
            started, cpu = time.perf_counter(), time.process_time()
            model.run("<CAPTION>", image, **settings)
            direct = time.perf_counter() - started
            direct_cpu += time.process_time() - cpu
            added.append(bench.ask(server, image, "<CAPTION>", **settings) - direct)
        server_cpu += _cpu_seconds(server)
    more = (server_cpu - direct_cpu) / len(added)
    return (
        f"HTTP adds p50 {_ms(added, 50)}, p99 {_ms(added, 99)} to f.run, {more * 1000:.1f} ms of the CPU on average "
        f"({len(added)} requests of {len(images[0]) / 1e3:.0f} kB)"
    )


def latency(bench: Bench) -> str:
    """Measure latencies at 70 % of the rate of `distinct`, with random arrivals, against one request alone (S5)."""
    with bench.server() as server:
        load = [(image, TASKS[i % len(TASKS)]) for i, image in enumerate(bench.images(bench.options.requests))]
        single = [bench.ask(server, *each) for each in load[:24]]
        rate = 0.7 * bench.rate(server, load)
        took = _poisson(bench, server, rate)
    answered = [seconds for seconds in took if seconds > 0]
    return (
        f"alone p50 {_ms(single, 50)}, p99 {_ms(single, 99)}; at {rate:.2f}/s for {bench.options.seconds:.0f} s "
        f"p50 {_ms(answered, 50)}, p99 {_ms(answered, 99)}, "
        f"which is {_ratio(answered, single, 50)} and {_ratio(answered, single, 99)} times; "
        f"{len(took) - len(answered)} of {len(took)} refused"
    )


def _poisson(bench: Bench, server: RunningServer, rate: float) -> list[float]:
    """Send requests at random times with a mean `rate`, whether answers come or not."""
    rng, waiting = Random(1), []
    images = bench.images(int(rate * bench.options.seconds * 1.5) + 8)
    with ThreadPoolExecutor(256) as clients:
        end = time.perf_counter() + bench.options.seconds
        for i, image in enumerate(images):
            if time.perf_counter() > end:
                break
            waiting.append(clients.submit(bench.ask, server, image, TASKS[i % len(TASKS)]))
            time.sleep(rng.expovariate(rate))
        return [each.result() for each in waiting]


def beside_long(bench: Bench) -> str:
    """Measure captions while an answer of up to 1,000 ids runs (S6)."""
    with bench.server("--deadline", "600") as server, ThreadPoolExecutor(1) as client:
        images = bench.images(41)
        first = [bench.ask(server, image, "<CAPTION>") for image in images[:20]]
        long = client.submit(_long_answers, server, png(502, 320, 240))  # which nano writes about without end
        second = [bench.ask(server, image, "<CAPTION>") for image in images[20:40]]
        _stop.append(True)
        count, ids = long.result()
    return (
        f"captions p50 {_ms(first, 50)} and p99 {_ms(first, 99)}, while {count} answers of {ids} ids ran p50 "
        f"{_ms(second, 50)} and p99 {_ms(second, 99)}: {_ratio(second, first, 99)} times at p99"
    )


_stop: list[bool] = []


def _long_answers(server: RunningServer, image: bytes) -> tuple[int, int]:
    """Ask for the longest answers, one after another, until told to stop; return how many, and the ids of the last."""
    count, ids = 0, 0
    while not _stop:
        done = server.chat("<DETAILED_CAPTION>", image, max_tokens=1000).json
        count, ids = count + 1, done["usage"]["completion_tokens"]
    return count, ids


def overload(bench: Bench) -> str:
    """Measure ten times as many requests as can be answered (S7)."""
    with bench.server() as server:
        load = [(image, TASKS[i % len(TASKS)]) for i, image in enumerate(bench.images(bench.options.requests))]
        rate = bench.rate(server, load)
        images = bench.images(64)
        took: list[tuple[float, float]] = []
        with ThreadPoolExecutor(320) as clients:
            end = time.perf_counter() + bench.options.seconds
            waiting, i = [], 0
            while time.perf_counter() < end:
                waiting.append(clients.submit(_timed, bench, server, images[i % 64] + bytes([i % 256, i // 256 % 256])))
                i += 1
                time.sleep(1 / (10 * rate))
            goodput = sum(each.done() and each.result()[0] > 0 for each in waiting) / bench.options.seconds
            took = [each.result() for each in waiting]
    statuses = {int(-outcome) for outcome, _ in took if outcome < 0}
    refused = [seconds for outcome, seconds in took if outcome < 0]
    return (
        f"capacity {rate:.2f}/s; at {10 * rate:.1f}/s for {bench.options.seconds:.0f} s {goodput:.2f}/s were answered "
        f"({goodput / rate:.0%}), {len(refused)} of {len(took)} refused with {statuses or 'nothing'} in "
        f"p50 {_ms(refused, 50)}, p99 {_ms(refused, 99)}"
    )


def _timed(bench: Bench, server: RunningServer, image: bytes) -> tuple[float, float]:
    started = time.perf_counter()
    return bench.ask(server, image, "<OD>"), time.perf_counter() - started


PARTS: dict[str, Callable[[Bench], str]] = {
    "distinct": distinct,
    "repeated": repeated,
    "alone": alone,
    "latency": latency,
    "beside-long": beside_long,
    "overload": overload,
}


def _with_noise(image: Image.Image, seed: int) -> Image.Image:
    """Return an image with a sensor's noise, of which a JPEG takes as many bytes as of a photograph."""
    noise = np.random.default_rng(seed).normal(0, 15, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)] if values else 0.0


def _ms(values: Sequence[float], percent: int) -> str:
    return f"{_percentile(values, percent) * 1000:.0f} ms"


def _ratio(values: Sequence[float], others: Sequence[float], percent: int) -> str:
    return f"{_percentile(values, percent) / _percentile(others, percent):.1f}"
