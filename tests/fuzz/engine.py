"""Send cases to worker processes, and stop those that hang.

A case is its class, seed and number, from which a worker draws the input again. Workers are forked from a server that
has imported torch, so a new one costs almost nothing.
"""

import multiprocessing
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTCOMES = ("refused", "accepted", "escape", "silent", "hang", "memory", "crash")
FAILURES = OUTCOMES[2:]
HANG_SECONDS = 20.0
"""CPU time that a case may take; a loaded machine must not look like a hang."""
PATIENCE = 240.0
"""Wall-clock time that a case may take, for one that waits and computes nothing."""
MEMORY_BYTES = 1 << 30

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["florence2.cli.main", "florence2.pipeline", "tests.terminal", "tests.fuzz.worker"])


@dataclass(frozen=True)
class Key:
    """One case: the same input on any machine."""

    name: str
    seed: int
    index: int

    def __str__(self) -> str:
        return f"python -m tests.fuzz {self.name} --seed {self.seed} --first {self.index} --cases 1"


@dataclass(frozen=True)
class Result:
    """What became of a case. `note` describes the input and, for a failure, where it happened."""

    key: Key
    outcome: str
    note: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES


class Worker:
    """A process that works through cases, replaced after a hang, a crash or a failure."""

    def __init__(self, material: Path):
        self.material = material
        self._process: Any = None

    def run(self, key: Key) -> Result:
        """Run one case."""
        if self._process is None:
            self._start()
        started = time.monotonic()
        self._pipe.send((key.name, key.seed, key.index))
        outcome, note = self._wait(_cpu_seconds(self._process.pid), started + PATIENCE)
        if outcome in FAILURES:
            self.close()  # its memory, threads or caches may be in any state
        return Result(key, outcome, note, time.monotonic() - started)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        from tests.fuzz.worker import work

        self._pipe, end = _server.Pipe()
        self._process = _server.Process(target=work, args=(end, self.material))
        self._process.start()
        end.close()
        if self._pipe.recv() != "ready":
            raise RuntimeError("The worker did not start.")

    def _wait(self, cpu_before: float, deadline: float) -> tuple[str, str]:
        """Wait for the outcome of the case under way; return it with the description of the case."""
        case = ""
        while True:
            while not self._pipe.poll(0.25):
                used = _cpu_seconds(self._process.pid) - cpu_before
                if used > HANG_SECONDS or time.monotonic() > deadline:
                    return "hang", f"{case}\n    {used:.0f} s of CPU time"
            try:
                outcome, note = self._pipe.recv()
            except EOFError:
                self._process.join()
                return "crash", f"{case}\n    exit code {self._process.exitcode}"
            if outcome == "broken":
                raise RuntimeError(note)
            if outcome != "started":
                return outcome, f"{case}\n    {note}".rstrip()
            case = note


def run_cases(keys: Iterable[Key], material: Path, jobs: int, each: Callable[[Result], None]) -> Counter[str]:
    """Run cases with `jobs` workers; call `each` with every result as it comes. Return the number of each outcome."""
    waiting: Iterator[Key] = iter(keys)
    results: queue.Queue[Result | BaseException | None] = queue.Queue()
    lock, counts = threading.Lock(), Counter[str]()

    def serve() -> None:
        worker = Worker(material)
        try:
            while True:
                with lock:
                    key = next(waiting, None)
                if key is None:
                    return
                try:
                    results.put(worker.run(key))
                except RuntimeError as error:
                    raise RuntimeError(f"{key}\n{error}") from None
        except BaseException as error:  # noqa: BLE001  raised again where it is seen
            results.put(error)
        finally:
            worker.close()
            results.put(None)

    for _ in range(jobs):
        threading.Thread(target=serve, daemon=True).start()
    left = jobs
    while left:
        result = results.get()
        if result is None:
            left -= 1
        elif isinstance(result, BaseException):
            raise result
        else:
            counts[result.outcome] += 1
            each(result)
    return counts


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its finished children; 0 for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
