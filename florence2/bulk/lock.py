"""A lock that one process holds on a folder; the system releases it when the process ends, however that happens."""

import contextlib
import errno
import os
from pathlib import Path

from florence2.errors import OptionError

LOCK_NAME = ".lock"
_NOTE = b"A run holds a lock on this file while it writes to this folder. The file itself means nothing.\n"
_HELD: set[int] = set()
"""The descriptors of the locks that this process holds."""
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}


class FolderLock:
    """The lock on a folder, or on a `part` of it, held until `release` or to the end of a `with` block.

    `note` is a sentence for the user where the file system has no locks, so that nothing keeps a second run away.
    """

    note: str | None = None

    def __init__(self, folder: Path, part: str = ""):
        """Take the lock. Raises OptionError when another run holds it, and OSError when no file can be made."""
        # the file stays: if it were removed, a third run could lock a new file while a second one holds the old one
        self._descriptor = os.open(folder / f"{LOCK_NAME}{part}", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_file(self._descriptor)
        except OSError as error:
            if error.errno in _TAKEN:
                self.release()
                raise OptionError(
                    f"Another run is writing to {folder}; wait until it ends, or choose another folder."
                ) from None
            self.note = f"The file system of {folder} has no locks; start no second run with this folder."
        _HELD.add(self._descriptor)
        with contextlib.suppress(OSError):  # a note that a full disk has no room for is not missed
            if not os.fstat(self._descriptor).st_size:
                os.write(self._descriptor, _NOTE)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back."""
        _HELD.discard(self._descriptor)
        os.close(self._descriptor)


def _close_held() -> None:
    """Close the locks of the parent in a process that was forked: one that outlives the parent would hold them."""
    while _HELD:
        os.close(_HELD.pop())


if os.name == "nt":
    import msvcrt

    def _lock_file(descriptor: int) -> None:
        # a byte far beyond the note, because nobody can read a locked byte on Windows
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    os.register_at_fork(after_in_child=_close_held)

    def _lock_file(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
