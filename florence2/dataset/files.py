"""Many small files and links: a second process makes them while this one reads rows.

The file system takes about as long for a million of them as reading a million rows does. As a program, this file is the
second process; it needs nothing but Python.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from io import FileIO

FEW = 20_000
"""So many files are made without a second process."""
_AT_ONCE = 1000  # that are handed over together
Job = tuple[str, "bytes | str"]
"""A path, and the content of the file there, or the target of the symbolic link."""


class Folders:
    """Makes files and links, and their folders, each once. Paths are texts: making those of pathlib takes as long."""

    def __init__(self) -> None:
        self._made: set[str] = set()

    def make_for(self, path: str) -> None:
        """Make the folder of a file."""
        folder = path.rpartition("/")[0]
        if folder not in self._made:
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103
            self._made.add(folder)

    def make(self, path: str, content: bytes | str) -> None:
        """Make a file with its content, or a link to its target."""
        self.make_for(path)
        if isinstance(content, str):
            os.symlink(content, path)  # noqa: PTH211
            return
        with FileIO(path, "w") as file:
            while content:  # a disk that is nearly full takes a part
                content = content[file.write(content) :]


class Files:
    """Makes files and links: the first `FEW` at once, further ones in a process of their own."""

    def __init__(self) -> None:
        self.folders = Folders()
        self._count = 0
        self._jobs: list[Job] = []
        self._process: subprocess.Popen[bytes] | None = None

    def make(self, path: str, content: bytes | str) -> None:
        """Make a file of these bytes, or a symbolic link to this path, now or until `finish`.

        Raises OSError, also for one that was to be made before.
        """
        if self._process is None:
            self.folders.make(path, content)
            self._count += 1
            if self._count == FEW and sys.executable:
                self._process = _start()
            return
        self._jobs.append((path, content))
        if len(self._jobs) == _AT_ONCE:
            self._send()

    def finish(self) -> None:
        """Return when all are made. Raises OSError if one cannot be."""
        if self._process is not None:
            self._send()
            self._send()  # nothing: that was all
            self._check()
        self.close()

    def close(self) -> None:
        """End the process, whatever is left to make."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _send(self) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            pickle.dump(self._jobs, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:  # it has ended, because it could not make one
            self._check()
        self._jobs = []

    def _check(self) -> None:
        """Wait for the end of the process. Raises OSError if it could not do everything."""
        assert self._process is not None and self._process.stdout is not None
        try:
            error = pickle.load(self._process.stdout)
        except EOFError:
            error = (0, "the process that makes the files was ended")
        if error:
            raise OSError(*error)


def _start() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _make_all() -> tuple[int, str] | None:
    """Make what comes through stdin, until an empty list comes; return the error that ended it, if there was one."""
    folders = Folders()
    try:
        while jobs := pickle.load(sys.stdin.buffer):
            for path, content in jobs:
                folders.make(path, content)
    except OSError as error:
        return error.errno or 0, error.strerror or str(error)
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that sends the work, and so this one
    with contextlib.suppress(EOFError, pickle.UnpicklingError):  # that process has ended, perhaps within a list
        pickle.dump(_make_all(), sys.stdout.buffer)
