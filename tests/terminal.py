"""The command line in a process of its own, with an environment of its own, which need not import torch again.

A server process imports torch and this package once, and is forked for every command; the Hub's client, which reads
its settings when it is imported, is imported by the command alone. The server imports the caller's `__main__`: a test
runner of one's own needs a main guard, and must not import the Hub's client at its top.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["florence2.cli.main", "florence2.pipeline", "tests.terminal"])


@dataclass(frozen=True)
class Done:
    """What became of a command."""

    returncode: int
    stdout: str
    stderr: str


def type_command(arguments: Sequence[str], environment: Mapping[str, str], seconds: float = 120) -> Done:
    """`florence2 ARGUMENTS` with nothing on stdin; TimeoutError when it takes longer than `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _server.Process(target=_run, args=(list(arguments), dict(environment), outputs))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"florence2 {' '.join(arguments)} took more than {seconds} s.")
        return Done(process.exitcode, *(output.read_text(encoding="utf-8") for output in outputs))


def _run(arguments: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
    from florence2.cli.main import main

    assert "huggingface_hub" not in sys.modules  # or it would have read another environment
    sys.exit(main(arguments))
