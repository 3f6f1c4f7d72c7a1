"""`python -m benchmarks label CHECK...`: `florence2 label` loses nothing, holds little and keeps the model busy.

Every check runs the real command in processes of its own, with the small model that comes with the package, and prints
lines of a table. The processes compute with one thread each unless `--threads` says otherwise.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.views import check_views as views
from florence2.errors import Florence2Error
from recipes.nano.scenes import make_scene

_SETTINGS = ["--model", "nano", "--beams", "1"]


def main(arguments: Sequence[str]) -> int:
    """Run the checks; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks label", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"{', '.join(_CHECKS)} (default: all)")
    parser.add_argument("--images", type=int, default=500, metavar="N", help="images of a run (default: 500)")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="kills of a run (default: 20)")
    parser.add_argument(
        "--rows", type=int, default=1_000_000, metavar="N", help="rows of `keys` and `views` (default: 1,000,000)"
    )
    parser.add_argument(
        "--files", type=int, default=100_000, metavar="N", help="images of `listing` (default: 100,000)"
    )
    parser.add_argument("--view", action="append", default=[], help="of `views` this one alone; repeatable")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each process (default: 1)")
    parser.add_argument(
        "--width", type=int, default=640, metavar="N", help="width of the images of `speed` (default: 640)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default: 0)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.checks if name not in _CHECKS]:
        parser.error(f"unknown check {unknown[0]}; known are {', '.join(_CHECKS)}")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    print("| check | result |\n| --- | --- |")
    for name in options.checks or _CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            for line in _CHECKS[name](Path(folder), options):
                print(f"| {name} | {line} |", flush=True)
    return 0


# ---- checks --------------------------------------------------------------------------------------------------------


def check_kills(folder: Path, options: argparse.Namespace) -> list[str]:
    """Kill runs at random moments; the rows must be those of a run that nobody disturbed, byte by byte."""
    draw(folder / "images", options.images)
    words = [folder / "images", "--task", "caption", "--batch", "1", "--workers", "1"]
    started = time.monotonic()
    run(*words, "--out", folder / "whole")
    seconds = time.monotonic() - started
    moments = random.Random(options.seed)
    results, counts, working = folder / "killed" / "results.jsonl", [0], 0
    for _ in range(options.kills):
        process = start(*words, "--out", folder / "killed")
        time.sleep(moments.uniform(0, 3 + 2 * seconds / options.kills))
        working += process.poll() is None
        process.kill()
        process.wait()
        counts.append(results.read_bytes().count(b"\n") if results.exists() else 0)
    lost = sum(after < before for before, after in pairwise(counts))
    run(*words, "--out", folder / "killed")
    same = results.read_bytes() == (folder / "whole" / "results.jsonl").read_bytes()
    rows = read_rows(folder / "killed")
    doubled = len(rows) - len({row["id"] for row in rows})
    during = sum(after > before for before, after in pairwise(counts))
    return [
        f"{options.images} images, {options.kills} times kill -9: {working} of runs that had not ended, {during} after "
        f"at least one row; {lost} lost rows, {doubled} doubled, {len(rows)} in the end; "
        f"{'byte-equal to' if same else 'DIFFERENT FROM'} an undisturbed run"
    ]


def check_same(folder: Path, options: argparse.Namespace) -> list[str]:
    """Compare the rows of other batches, workers and shards with those of one image after another."""
    draw(folder / "images", options.images)
    words = [folder / "images", "--task", "od"]
    run(*words, "--batch", "1", "--workers", "0", "--out", folder / "plain")
    expected, lines = read_rows(folder / "plain"), []
    for batch, workers in ((1, 2), (4, 0), (4, 2), (16, 0), (16, 2)):
        out = folder / f"{batch}-{workers}"
        run(*words, "--batch", str(batch), "--workers", str(workers), "--out", out)
        lines.append(f"--batch {batch} --workers {workers}: {compare(expected, read_rows(out))}")
    for part in range(1, 6):
        run(*words, "--batch", "16", "--shard", f"{part}/5", "--out", folder / "shards")
    joined = sorted(read_rows(folder / "shards"), key=lambda row: str(row["id"]))
    lines.append(f"5 shards, joined: {compare(expected, joined)}")
    return lines


def check_keys(folder: Path, options: argparse.Namespace) -> list[str]:
    """Open a journal with many finished rows, with and without its index."""
    with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
        for number in range(options.rows):
            name = f"{number:07}.jpg"
            row = {"image": f"photos/{name}", "place": f"/data/photos/{name}", "id": name, "task": "<CAPTION>"}
            file.write(json.dumps({**row, "kind": "text", "text": "a car", "image_size": [640, 480]}) + "\n")
    measured = [measure(_OPEN, folder, options.rows) for _ in range(2)]
    return [
        f"{options.rows:,} finished rows, {state}: opened in {seconds:.2f} s with {megabytes:.0f} MB more memory, of "
        f"which {held * 1e6 / options.rows:.1f} bytes a row stay"
        for state, (seconds, megabytes, held) in zip(("without index", "with index"), measured, strict=True)
    ]


def check_listing(folder: Path, options: argparse.Namespace) -> list[str]:
    """List many images."""
    draw(folder / "one", 1)
    image, lines = (folder / "one" / "00000.jpg").read_bytes()[:1000], []
    for count in (1000, options.files):
        many = folder / str(count)
        for number in range(count):
            part = many / f"{number // 1000:04}"
            part.mkdir(parents=True, exist_ok=True)
            (part / f"{number:06}.jpg").write_bytes(image)
        seconds, megabytes, _ = measure(_LIST, many, count)
        lines.append(f"{count:,} images listed in {seconds:.2f} s with {megabytes:.1f} MB more memory")
    return lines


def check_speed(folder: Path, options: argparse.Namespace) -> list[str]:
    """Compare with `florence2 run`, and with no workers."""
    draw(folder / "images", options.images, (options.width, options.width * 3 // 4))
    words, lines = [folder / "images", "--batch", "16"], []
    for name, rest in (
        ("run", ["run", "od", *words, "--json"]),
        ("label --workers 0", ["label", *words, "--task", "od", "--workers", "0"]),
        ("label --workers 1", ["label", *words, "--task", "od", "--workers", "1"]),
    ):
        out = folder / name.replace(" ", "")
        began, processor = time.monotonic(), cpu_seconds()
        report = subprocess.run(command(*rest, "--out", out), capture_output=True, text=True, check=True).stderr
        seconds, used = time.monotonic() - began, cpu_seconds() - processor
        last = report.strip().splitlines()[-1] if name != "run" else ""
        lines.append(f"{name}: {options.images} images in {seconds:.1f} s ({used:.1f} s of processor) {last}")
    return lines


def check_views(folder: Path, options: argparse.Namespace) -> Iterable[str]:
    """Write each view of many rows."""
    return views(folder, options.rows, options.view)


_CHECKS: dict[str, Callable[[Path, argparse.Namespace], Iterable[str]]] = {
    "kills": check_kills,
    "same": check_same,
    "keys": check_keys,
    "listing": check_listing,
    "speed": check_speed,
    "views": check_views,
}

# ---- processes -----------------------------------------------------------------------------------------------------

_MEASURE = """
import ctypes, re, sys, time
from pathlib import Path
from florence2.label.journal import Journal
from florence2.label.sources.opening import open_sources
memory = lambda name: int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
before, held = memory("VmHWM"), memory("RssAnon")
folder, expected, started = Path(sys.argv[1]), int(sys.argv[2]), time.perf_counter()
"""
_OPEN = "journal = Journal(folder, {})\ncount = len(journal.finished)\n"
_LIST = "count = sum(1 for _ in open_sources([str(folder)]))\n"
_REPORT = (
    "assert count == expected\nseconds = time.perf_counter() - started\n"
    "ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system\n"
    "print(seconds, memory('VmHWM') - before, memory('RssAnon') - held)\n"
)


def measure(code: str, folder: Path, expected: int) -> tuple[float, float, float]:
    """Return the seconds that some code takes in a process of its own, and the megabytes, at most and afterwards."""
    words = [sys.executable, "-c", _MEASURE + code + _REPORT, str(folder), str(expected)]
    seconds, megabytes, held = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), float(megabytes), float(held)


def command(*words: object) -> list[str]:
    """Return the words of a command of `florence2` with the settings of all checks."""
    return [sys.executable, "-m", "florence2", *map(str, words), *_SETTINGS]


def start(*words: object) -> "subprocess.Popen[bytes]":
    """Start `florence2 label`."""
    return subprocess.Popen(command("label", *words), stderr=subprocess.DEVNULL)


def run(*words: object) -> None:
    """Run `florence2 label` to its end. Raises Florence2Error where it fails."""
    if start(*words).wait():
        raise Florence2Error(f"florence2 label {' '.join(map(str, words))} failed.")


def cpu_seconds() -> float:
    """Return the processor time of all ended processes that this one started."""
    return os.times().children_user + os.times().children_system


# ---- images and rows -----------------------------------------------------------------------------------------------


def draw(folder: Path, count: int, size: tuple[int, int] | None = None) -> None:
    """Draw synthetic scenes, in their own sizes or in one."""
    folder.mkdir(parents=True)
    for number in range(count):
        image = make_scene(number, 1 + number % 4).image
        (image if size is None else image.resize(size)).save(folder / f"{number:05}.jpg")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a folder, of its shards one after another."""
    files = sorted(folder.glob("results*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def compare(expected: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """Say whether rows have the same images in the same order and the same texts, and how far their numbers differ."""
    order = [row["id"] for row in rows] == [row["id"] for row in expected]
    texts = [row.get("raw_text") for row in rows] == [row.get("raw_text") for row in expected]
    widest = max((abs(a - b) for pair in zip(expected, rows, strict=False) for a, b in _numbers(*pair)), default=0.0)
    return (
        f"{len(rows)} rows, {'same' if order else 'ANOTHER'} order, {'same' if texts else 'OTHER'} tokens, "
        f"scores within {widest:.1e}"
    )


def _numbers(one: Any, other: Any) -> list[tuple[float, float]]:
    """Return the pairs of floats at the same places of two JSON values."""
    if isinstance(one, float) and isinstance(other, float):
        return [(one, other)]
    if isinstance(one, dict) and isinstance(other, dict):
        return [pair for key in one.keys() & other.keys() for pair in _numbers(one[key], other[key])]
    if isinstance(one, list) and isinstance(other, list):
        return [pair for each in zip(one, other, strict=False) for pair in _numbers(*each)]
    return []
