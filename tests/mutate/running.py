"""Run tests against a mutant in a copy of the checkout: each test file in a process of its own, with a time limit."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from tests.mutate.mutants import Mutant

LEFT_OUT = (".git", ".venv", "venv", "__pycache__", "build", "dist", ".*_cache", "*.egg-info")
TIMES = 5
"""A mutant that takes so many times as long as the unchanged code hangs, and counts as killed."""
LEAST = 20.0
"""Seconds that every test file has: the machine may be busy."""
MOST_BYTES = 8 << 30
"""A mutant that takes more memory fails, and leaves the machine alone."""
UNMEASURED = 120.0
"""Seconds that a test file has where its time on the unchanged code is not measured."""
NO_TESTS = 5
"""pytest's exit code where nothing was collected."""


class Checkout:
    """A copy of a checkout, in which files are changed and tests run."""

    def __init__(self, root: Path, folder: Path):
        self.folder = folder
        shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """Hold the mutant in its file inside the block."""
        path = self.folder / mutant.path
        text = path.read_text(encoding="utf-8")
        self._write(path, mutant.apply(text))
        try:
            yield
        finally:
            self._write(path, text)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        # a change of the same length within one second would leave the compiled file in force
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()

    def passes(self, test: str, limit: float) -> bool:
        """Return whether a test file passes within `limit` seconds."""
        plain = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", ""]  # those marked "release" too
        command = [sys.executable, "-m", "pytest", *plain, test]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder)},  # processes that tests start see the mutant too
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_limit_memory,
        )
        try:
            return process.wait(limit) in (0, NO_TESTS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and whatever it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass
class Clock:
    """How long each test file takes on the unchanged code; measured when it is asked for the first time.

    With `passed`, all are known to pass on it: they are not run for that, and have `UNMEASURED` seconds.
    """

    passed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    locks: dict[str, Lock] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def limit(self, test: str, checkout: Checkout) -> float:
        """Return how many seconds a test file may take. Raises RuntimeError when it fails without a mutant."""
        if self.passed:
            return UNMEASURED
        with self.lock:
            own = self.locks.setdefault(test, Lock())
        with own:
            if test not in self.seconds:
                started = time.monotonic()
                if not checkout.passes(test, 900):
                    raise RuntimeError(f"{test} fails without any mutant; mend that first.")
                self.seconds[test] = time.monotonic() - started
        return max(LEAST, TIMES * self.seconds[test])


def is_killed(mutant: Mutant, tests: list[str], checkout: Checkout, clock: Clock) -> bool:
    """Return whether one of the tests, asked one after another, fails with the mutant."""
    for test in tests:
        limit = clock.limit(test, checkout)
        with checkout.mutated(mutant):
            if not checkout.passes(test, limit):
                return True
    return False


def run_all(
    mutants: list[Mutant],
    tests: Callable[[Mutant], list[str]],
    root: Path,
    jobs: int,
    report: Callable[[Mutant, bool], None],
    passed: bool = False,
) -> list[Mutant]:
    """Return the mutants that no test kills, in their order; `report` gets each as it is known.

    `passed` says that all tests pass on the unchanged code.
    """
    clock = Clock(passed)
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        free: SimpleQueue[Checkout] = SimpleQueue()
        for job in range(jobs):
            free.put(Checkout(root, Path(folder) / f"copy{job}"))

        def judge(mutant: Mutant) -> bool:
            checkout = free.get()
            try:
                killed = is_killed(mutant, tests(mutant), checkout, clock)
            finally:
                free.put(checkout)
            report(mutant, killed)
            return killed

        with ThreadPoolExecutor(jobs) as pool:
            try:
                results = list(pool.map(judge, mutants))
            except BaseException:  # a test that fails without mutants, or Ctrl-C: the others are not begun
                pool.shutdown(cancel_futures=True)
                raise
    return [mutant for mutant, killed in zip(mutants, results, strict=True) if not killed]
