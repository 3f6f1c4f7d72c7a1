"""The worker: draws a case from its number, runs its check within limits, and reports what became of it."""

import contextlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

import florence2
from florence2.errors import Florence2Error
from tests.fuzz.engine import MEMORY_BYTES

SPACE_BYTES = 8 << 30
"""Address space of a worker beyond what it has at the start."""
_STARTS = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
PACKAGE = f"{Path(florence2.__file__).parent}{os.sep}"
_EXPECTED_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory")
_alarms: int | None = None
"""The file to which a connection or a program started within a case is reported, also by a fork of this process."""


class Wrong(Exception):
    """Something broken was accepted, lost, or executed: nobody would notice."""


class Hang(Exception):
    """A program that the case has started did not end."""


def expect(condition: object, message: str) -> None:
    """Raise Wrong unless the condition holds."""
    if not condition:
        raise Wrong(message)


def work(pipe: Any, material: Path) -> None:
    """Answer every (class, seed, number) from the pipe with (outcome, note), until the pipe is closed."""
    _prepare()
    root = Path(tempfile.mkdtemp(prefix="worker-", dir=material))
    tempfile.tempdir = str(root)  # what a case leaves there goes with the run's folder
    sys.addaudithook(_watch)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            name, seed, index = pipe.recv()
            place = Path(tempfile.mkdtemp(dir=root))
            try:
                module, case = draw_case(name, seed, index)
                pipe.send(("started", _shorten(repr(case), 300)))  # known even if the case never ends
                pipe.send(run_case(module, case, index, place))
            except BaseException:  # noqa: BLE001  a fault of the suite itself, which must not look like a finding
                pipe.send(("broken", traceback.format_exc()))
            os.chdir(root)
            shutil.rmtree(place, ignore_errors=True)


def draw_case(name: str, seed: int, index: int) -> tuple[Any, Any]:
    """Return the module of a class and the input of one of its cases."""
    module = importlib.import_module(f"tests.fuzz.{name}")
    return module, module.draw(random.Random(f"{name}/{seed}/{index}"))


def run_case(module: Any, case: Any, index: int, place: Path) -> tuple[str, str]:
    """Return the outcome of one case and its details. `place` is an empty folder."""
    torch.manual_seed(index)
    os.chdir(place)
    before = _reset_peak()
    outcome, detail = _outcome(module, case, place)
    grown = _status_bytes("VmHWM") - before
    if outcome in ("refused", "accepted") and grown > MEMORY_BYTES:
        return "memory", f"{grown >> 20:,} MiB"
    return outcome, detail


def _outcome(module: Any, case: Any, place: Path) -> tuple[str, str]:
    global _alarms
    alarms = place.with_suffix(".alarms")
    _alarms = os.open(alarms, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        outcome, detail = _judge(module, case, place)
    finally:
        os.close(_alarms)
        _alarms = None
    started = alarms.read_text()
    return ("silent", f"started or connected: {started}") if started else (outcome, detail)


def _judge(module: Any, case: Any, place: Path) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.check(case, place)
    except Florence2Error as error:
        return _judge_refusal(error)
    except Wrong as error:
        return "silent", str(error)
    except Hang as error:
        return "hang", str(error)
    except BaseException as error:  # a panic of Rust is not an Exception
        if not _frames(error):
            raise
        full = isinstance(error, MemoryError) or any(words in str(error) for words in _EXPECTED_MEMORY)
        return "memory" if full else "escape", f"{type(error).__name__} at {_place(error)}: {_shorten(str(error), 200)}"
    return "accepted", ""


def _judge_refusal(error: Florence2Error) -> tuple[str, str]:
    """A refusal is a short text that can be shown and has an end."""
    message = str(error)
    if not message.strip():
        return "silent", f"an empty message at {_place(error)}"
    if len(message) > 20_000:
        return "silent", f"a message of {len(message):,} characters at {_place(error)}: {message[:100]}"
    return "refused", _shorten(message, 200)


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the calls inside the package that led to an error."""
    return [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]


def _place(error: BaseException) -> str:
    """Return the innermost place in the package."""
    frames = _frames(error)
    return f"{frames[-1].filename.removeprefix(PACKAGE)}:{frames[-1].lineno}" if frames else "?"


def _shorten(text: str, most: int) -> str:
    plain = text.encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= most else f"{plain[:most]}..."


# ---- limits --------------------------------------------------------------------------------------------------------


def _prepare() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    # an audit hook cannot be removed or masked by an `except`, so a program that a file starts is always seen
    soft = _status_bytes("VmSize") + SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _alarms is not None and event in _STARTS:
        os.write(_alarms, f"{event} {_shorten(repr(arguments), 100)}\n".encode())


def _reset_peak() -> int:
    """Make the peak of RSS start again; return RSS in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return 0
