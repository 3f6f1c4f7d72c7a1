"""A file of rows, each a line of JSON that is written wholly or not at all."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from florence2.errors import OptionError


def to_line(values: Mapping[str, Any]) -> bytes:
    """Return a row in the form of `Row.to_dict` as a line of the file."""
    return (json.dumps(values, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


class RowFile:
    """A file that only grows. Nothing waits in a buffer, so that a process that is killed loses no row."""

    def __init__(self, path: Path):
        """Open the file, or create it. Raises OSError where that fails."""
        self.path = path
        self._file = path.open("ab", buffering=0)

    @property
    def size(self) -> int:
        """The length in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, line: bytes) -> None:
        """Write a line. Raises OptionError where it cannot be written; no part of it stays in the file."""
        end = self.size
        try:
            while line:
                line = line[self._file.write(line) :]
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            if isinstance(error, OSError):
                raise OptionError(
                    f"{self.path} cannot be written: {error.strerror}. The rows in it are complete; the same "
                    "command resumes after them."
                ) from None
            raise

    def sync(self) -> None:
        """Wait until the rows are on the disk, and so survive a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
