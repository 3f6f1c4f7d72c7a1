"""A command line in a fork of the worker: as a process of its own, but without importing torch again."""

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from florence2 import __main__ as program
from florence2.cli.main import main
from tests.fuzz.engine import HANG_SECONDS, PATIENCE
from tests.fuzz.worker import Hang, expect

_TRACEBACK = 70
"""The exit code of the fork when an exception leaves `main`."""


@dataclass
class Streams:
    """Where the standard streams of a command lead: a file, "closed", "full", or "gone" for a pipe without a reader."""

    stdin: str = os.devnull
    stdout: str = "file"
    stderr: str = "file"
    limits: Mapping[int, int] = field(default_factory=dict)


class Command:
    """A command that runs. `output` is the folder of its files stdout and stderr."""

    def __init__(self, words: Sequence[str], output: Path, streams: Streams | None = None, cwd: Path | None = None):
        self.words, self.output = words, output
        output.mkdir(parents=True, exist_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            _live(words, output, streams or Streams(), cwd)

    def wait(self) -> int:
        """Return the exit code; minus the signal's number where one ended the command. Raises Hang."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                if code == -signal.SIGXCPU or usage.ru_utime > HANG_SECONDS:
                    raise Hang(f"{self.words}: {usage.ru_utime:.0f} s of CPU time")
                return code
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise Hang(f"{self.words} took more than {PATIENCE:.0f} s")

    def send(self, number: int) -> None:
        """Send a signal, if the command still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def text(self, stream: str) -> str:
        """What the command has written to "stdout" or "stderr"."""
        file = self.output / stream
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def type_words(
    words: Sequence[str], output: Path, streams: Streams | None = None, cwd: Path | None = None
) -> tuple[int, Command]:
    """Run a command to its end; raise Wrong for a traceback, an unknown exit code, or a failure without a word."""
    command = Command(words, output, streams, cwd)
    code = command.wait()
    check_end(code, command, streams)
    return code, command


def check_end(code: int, command: Command, streams: Streams | None = None) -> None:
    """Raise Wrong unless a command has ended as a command must."""
    told = command.text("stderr")
    expect("Traceback" not in told and code != _TRACEBACK, f"exit {code}: {told[-400:]}")
    expect(code in (0, 1, 2, 130), f"exit {code}: {told[-200:]}")
    heard = (streams is None or streams.stderr == "file") and "--json" not in command.words  # else the row says it
    expect(code == 0 or not heard or told.strip(), f"exit {code} without a word")


def _live(words: Sequence[str], output: Path, streams: Streams, cwd: Path | None) -> None:
    """Be the command; does not return."""
    code = _TRACEBACK
    try:
        for kind, most in streams.limits.items():
            resource.setrlimit(kind, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (int(HANG_SECONDS), int(HANG_SECONDS) + 5))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full disk: writing fails, the process lives
        os.chdir(cwd or output)
        _connect(0, streams.stdin, output / "stdin", os.O_RDONLY)
        _connect(1, streams.stdout, output / "stdout", os.O_WRONLY)
        _connect(2, streams.stderr, output / "stderr", os.O_WRONLY)
        code = _main(words)
    except BaseException:  # noqa: BLE001
        import traceback

        with contextlib.suppress(Exception):
            (output / "stderr").open("a", encoding="utf-8").write(traceback.format_exc())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _main(words: Sequence[str]) -> int:
    """Run the program as a shell does, with what it does about signals and streams."""
    launch = getattr(program, "launch", None)
    sys.argv = ["florence2", *words]
    try:
        return main(words) if launch is None else int(launch())
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _connect(number: int, kind: str, file: Path, mode: int) -> None:
    """Connect a standard stream, and give Python the object that it would have made at the start."""
    name = ("stdin", "stdout", "stderr")[number]
    if kind == "closed":
        os.close(number)
        setattr(sys, name, None)
        return
    if kind == "gone":
        reader, end = os.pipe()
        os.close(reader)
    else:
        path = {"full": "/dev/full", "file": str(file)}.get(kind, kind)
        end = os.open(path, mode | (os.O_CREAT | os.O_APPEND if number else 0), 0o600)
    os.dup2(end, number)
    if end != number:
        os.close(end)
    opened = open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    setattr(sys, name, opened)
