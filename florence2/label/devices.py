"""Several devices of one machine: a process for each does a shard of its own."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import TextIO

from florence2.cli.main import EXIT_INCOMPLETE, EXIT_STOPPED, EXIT_USAGE, error_sentence
from florence2.cli.options.arguments import say
from florence2.errors import Florence2Error
from florence2.label.processes import signals_blocked, when_parent_ends

Label = Callable[[argparse.Namespace], int]


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_options(options: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the options of each device's process: a shard of the images, and its share of the decode workers."""
    count = len(options.devices)
    part, parts = options.shard or (1, 1)
    workers = max(1, options.workers // count) if options.workers else 0
    changes = [
        {"device": device, "shard": (number * parts + part, count * parts), "workers": workers, "devices": None}
        for number, device in enumerate(options.devices)
    ]
    return [argparse.Namespace(**{**vars(options), **change}) for change in changes]


def label_on_devices(options: argparse.Namespace, label: Label) -> int:
    """Call `label` in a process for each device; return the worst exit code."""
    spawn = get_context("spawn")
    processes: list[BaseProcess] = []
    threads = max(1, count_cores() // len(options.devices))
    try:
        for part in split_options(options):
            process: BaseProcess = spawn.Process(target=_label_part, args=(part, label, threads))
            with signals_blocked():  # this process hands a signal on, once
                process.start()
            processes.append(process)
        for started in processes:
            started.join()
    except BaseException as error:
        _stop(processes)
        if not isinstance(error, KeyboardInterrupt):
            raise
        return EXIT_STOPPED
    return _worst([process.exitcode or 0 for process in processes])


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _worst(codes: list[int]) -> int:
    """Return the exit code of all processes together; a negative one is the number of a signal."""
    if killed := [code for code in codes if code < 0]:
        say(f"florence2: {len(killed)} of {len(codes)} processes ended by a signal ({-killed[0]}).")
    order = (EXIT_STOPPED, EXIT_USAGE, EXIT_INCOMPLETE)
    known = [code if code in (0, *order) else EXIT_INCOMPLETE for code in codes]
    return next((code for code in order if code in known), 0)


def _label_part(options: argparse.Namespace, label: Label, threads: int) -> None:
    """Label one shard; exit with its code. SIGTERM stops it as Ctrl-C does, and so does the end of the parent."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    when_parent_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
    sys.stderr = Prefixed(sys.stderr, f"[{options.device} {options.shard[0]}] ")
    if options.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read when torch is imported
    try:
        sys.exit(label(options))
    except (Florence2Error, OSError) as error:
        say(f"florence2: {error_sentence(error)}")
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)


class Prefixed:
    """A stream of words whose lines say which process writes them. It is not a terminal: no line is written twice."""

    def __init__(self, stream: TextIO, prefix: str):
        self._stream, self._prefix = stream, prefix
        self._line = ""

    def write(self, text: str) -> int:
        """Write the lines that are complete."""
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self._prefix}{line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        """Write everything that is complete to the stream below."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Return False."""
        return False
