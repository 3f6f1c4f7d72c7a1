"""Longer attacks on a server: `python -m tests.serve.attack NAME [--count N] [--seed S]`, each ends with one line.

agreement: answers of 16 clients against the library's. requests: mutated requests. images: spoilt images and bombs.
schema: schemathesis on /openapi.json. signals: SIGTERM with 32 requests in flight. leaving: clients that leave.
deaths: kill -9 of one of two devices' processes. memory: the process after many requests.
"""

import argparse
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from PIL import Image

import florence2
from tests.serve.agreement import disagreements
from tests.serve.server import RunningServer, chat_body, encode, native_body, png, processes_of, serving
from tests.serve.spoilt import bombs, change, change_bytes, head, send

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "QOI")
_CASES = {"agreement": 3000, "requests": 10_000, "images": 1000, "schema": 200, "signals": 30, "leaving": 1000}
_CASES |= {"memory": 5000, "deaths": 5}


def main() -> int:
    """Run one attack; return 1 where it found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.serve.attack")
    parser.add_argument("name", choices=list(_CASES))
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    attack: Callable[[Path, int, int], list[str]] = globals()[options.name]
    count = options.count or _CASES[options.name]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        problems = attack(Path(folder), count, options.seed)
    for problem in problems[:20]:
        print(problem)
    took = time.monotonic() - started
    print(f"{options.name}: {count} cases, seed {options.seed}, {len(problems)} problems, {took:.0f} s")
    return bool(problems)


def agreement(folder: Path, count: int, seed: int) -> list[str]:
    """Ask at random from 16 clients."""
    with serving(folder) as server:
        return disagreements(server, florence2.load("nano", device="cpu"), count, 16, 4, seed)


# ---- spoilt input --------------------------------------------------------------------------------------------------


def requests(folder: Path, count: int, seed: int) -> list[str]:
    """Send requests with bytes, values and heads changed; every reply must be HTTP, below 500, and quick."""
    with serving(folder) as server, ThreadPoolExecutor(4) as threads:
        before, counted = memory_of(server), iter(range(count))
        found = [each for each in threads.map(lambda i: _spoilt(server, Random(seed * 1_000_003 + i)), counted) if each]
        assert server.chat("<CAPTION>", png()).status == 200
        return [*found, *_grown(server, before, 300)]


def _spoilt(server: RunningServer, rng: Random) -> str | None:
    image = png(rng.randrange(8), 40, 30)
    body = rng.choice([chat_body("<OD>", image, max_tokens=2), native_body(image, "od", options={"max_new_tokens": 2})])
    path = "/v1/chat/completions" if "messages" in body else "/v1/florence2"
    kind = rng.randrange(4)
    data = json.dumps(change(body, rng) if kind == 0 else body).encode()
    if kind == 1:
        data = change_bytes(data, rng)
    raw = head(path, data, rng, spoil=kind == 2) + data
    if kind == 3:
        raw = change_bytes(raw, rng, first=200)
    started = time.monotonic()
    reply = send(server.port, raw)
    took = time.monotonic() - started
    status = re.match(rb"HTTP/1\.1 (\d+) ", reply)
    if reply and (status is None or int(status.group(1)) >= 500):
        return f"{raw[:300]!r} -> {reply[:300]!r}"
    return f"{raw[:300]!r} took {took:.1f} s" if took > 20 else None


def images(folder: Path, count: int, seed: int) -> list[str]:
    """Send spoilt images of every format, and bombs of 20,000 x 20,000 pixels."""
    rng, problems = Random(seed), []
    with serving(folder) as server:
        before = memory_of(server)
        files = {name: encode(Image.open(io.BytesIO(png())).convert("RGB"), name) for name in FORMATS}
        cases = [(name, change_bytes(files[name], rng)) for name in FORMATS for _ in range(count // len(FORMATS))]
        cases += [(f"bomb {name}", data) for name, data in bombs().items()]
        for name, data in cases:
            started = time.monotonic()
            reply = server.post("/v1/florence2", native_body(data, "od", options={"max_new_tokens": 2, "num_beams": 1}))
            took = time.monotonic() - started
            if reply.status not in (200, 400) or (name.startswith("bomb") and reply.status != 400) or took > 5:
                problems.append(f"{name}: {reply.status} in {took:.1f} s, {reply.body[:200]!r}")
        return [*problems, *_grown(server, before, 300)]


# ---- the process ---------------------------------------------------------------------------------------------------


def signals(folder: Path, count: int, seed: int) -> list[str]:
    """Send SIGTERM with 32 requests in flight; every one must be answered, and the exit code be 0."""
    problems, accepted = [], 0
    for i in range(count):
        with serving(folder) as server, ThreadPoolExecutor(32) as threads:
            bodies = [chat_body("<OD>", png(seed * 100_000 + 100 * i + j), max_tokens=8) for j in range(32)]
            replies = [threads.submit(_post_or_error, server, body) for body in bodies]
            while server.metric("picture_cache_queries_total") < 32:
                time.sleep(0.01)
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            statuses = [reply.result() for reply in replies]
            code, took = server.process.wait(timeout=60), time.monotonic() - started
            accepted += 32
            if code or took > 32 or set(statuses) != {200}:
                problems.append(f"round {i}: exit code {code} after {took:.1f} s, {sorted(map(str, statuses))}")
    print(f"signals: {accepted} accepted")
    return problems


def _post_or_error(server: RunningServer, body: object) -> int | str:
    try:
        return server.post("/v1/chat/completions", body).status
    except OSError as error:
        return repr(error)


def deaths(folder: Path, count: int, seed: int) -> list[str]:
    """Kill one of two processes under 200 requests, which must all be answered, and once."""
    problems = []
    with serving(folder, "--devices", "cpu,cpu") as server, ThreadPoolExecutor(16) as threads:
        for i in range(count):
            bodies = [chat_body("<CAPTION>", png(seed * 100_000 + 200 * i + j)) for j in range(200)]
            before = server.metric("picture_cache_queries_total")
            replies = [threads.submit(_post_or_error, server, body) for body in bodies]
            while server.metric("picture_cache_queries_total") < before + 20 + 25 * i:
                time.sleep(0.02)
            os.kill(processes_of(server)[i % 2], signal.SIGKILL)
            statuses = [reply.result() for reply in replies]
            if set(statuses) != {200}:
                problems.append(f"round {i}: {Counter(map(str, statuses))}")
            server.wait_for("workers", 2, seconds=60)
        answered = server.metric("request_success_total")
        print(f"deaths: {answered:.0f} answers to {200 * count} requests")
        return problems + [f"{answered} answers"] * (answered != 200 * count)


def leaving(folder: Path, count: int, seed: int) -> list[str]:
    """Let clients leave at once or a little later; nothing may stay."""
    rng, problems = Random(seed), []
    with serving(folder) as server:
        counts = [_counts(server)]
        for start in range(0, count, 50):
            opened = []
            for i in range(start, min(count, start + 50)):
                body = json.dumps(chat_body("<OD>", png(i % 40), stream=bool(i % 2))).encode()
                connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
                connection.sendall(head("/v1/chat/completions", body, rng, spoil=False) + body)
                opened.append(connection)
                if rng.random() < 0.5:
                    time.sleep(rng.random() * 0.01)
            for connection in opened:
                connection.close()
            started = time.monotonic()
            for name in ("requests_running", "requests_waiting", "queue_bytes"):
                server.wait_for(name, 0)
            if time.monotonic() - started > 1.5:
                problems.append(f"after {start}: gauges at 0 only after {time.monotonic() - started:.1f} s")
            time.sleep(0.05)
            counts.append(_counts(server))
        if counts[-1][0] > counts[1][0] + 2 or counts[-1][1] > counts[1][1] + 3:
            problems.append(f"threads and files grow: {counts}")
    print(f"leaving: threads and files {counts[1]} at first, {counts[-1]} at last")
    return problems


def _counts(server: RunningServer) -> tuple[int, int]:
    folder = Path(f"/proc/{server.process.pid}")
    return len([*(folder / "task").iterdir()]), len([*(folder / "fd").iterdir()])


def memory(folder: Path, count: int, seed: int) -> list[str]:
    """Ask about distinct images after 500 for warming; the memory must stay."""
    with serving(folder, "--cache-mb", "16") as server, ThreadPoolExecutor(8) as threads:

        def ask(i: int) -> int:
            return server.post(
                "/v1/florence2",
                native_body(png(seed + i, 40, 30), "caption", options={"num_beams": 1, "max_new_tokens": 6}),
            ).status

        assert {*threads.map(ask, range(500))} == {200}
        found, statuses = [memory_of(server)], set()
        for part in range(10):
            statuses |= {*threads.map(ask, range(500 + part * count // 10, 500 + (part + 1) * count // 10))}
            found.append(memory_of(server))
        kept = server.metric("picture_cache_bytes")
        print(f"memory: {', '.join(f'{each:.1f}' for each in found)} MB; cache {kept / 1e6:.1f} MB")
        return (
            [f"{statuses}"] * (statuses != {200})
            + [f"grew {found[-1] - found[0]:.1f} MB"] * (found[-1] - found[0] > 30)
            + ["cache"] * (kept > 16 << 20)
        )


def memory_of(server: RunningServer) -> float:
    """The resident memory of the process in MB."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024


def _grown(server: RunningServer, before: float, most: float) -> list[str]:
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text()).group(1)) / 1024
    print(f"memory: {before:.0f} MB before, {peak:.0f} MB at most")
    return [f"memory: {before:.0f} MB, at most {peak:.0f} MB"] if peak - before > most else []


def schema(folder: Path, count: int, seed: int) -> list[str]:
    """Let schemathesis try every operation with all its checks."""
    with serving(folder) as server:
        config = folder / "schemathesis.toml"
        # no schema can say that base64 is an image, or that a model or a hash is known
        config.write_text('[checks.positive_data_acceptance]\nexpected-statuses = ["2xx", "400", "404"]\n')
        words = [str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(config), "run"]
        words += [
            f"http://127.0.0.1:{server.port}/openapi.json",
            "--checks",
            "all",
            "-n",
            str(count),
            "--seed",
            str(seed),
        ]
        done = subprocess.run([*words, "--no-color"], capture_output=True, text=True, check=False)
        Path("/tmp/schemathesis.out").write_text(done.stdout + done.stderr)
        errors = server.metric("request_failure_total")
        print(f"schema: {errors:.0f} requests refused")
    return [] if done.returncode == 0 else done.stdout.splitlines()[-30:]


if __name__ == "__main__":
    sys.exit(main())
