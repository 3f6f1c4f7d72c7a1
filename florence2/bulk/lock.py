"""A lock that one process holds on a folder; the system releases it when the process ends, however that happens."""

import contextlib
import errno
import os
from pathlib import Path

from florence2.errors import OptionError

LOCK_NAME = ".lock"
_NOTE = b"A run holds a lock on this file while it writes to this folder. The file itself means nothing.\n"
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}


class FolderLock:
    """The lock on a folder, held until `release`.

    `works` is False where the file system has no locks; then nothing keeps a second run away.
    """

    def __init__(self, folder: Path):
        """Take the lock. Raises OptionError when another run holds it, and OSError when no file can be made."""
        # the file stays: if it were removed, a third run could lock a new file while a second one holds the old one
        self._descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self.works = True
            _lock_file(self._descriptor)
        except OSError as error:
            if error.errno in _TAKEN:
                self.release()
                raise OptionError(
                    f"Another run is writing to {folder}; wait until it ends, or choose another folder."
                ) from None
            self.works = False
        with contextlib.suppress(OSError):  # a note that a full disk has no room for is not missed
            if not os.fstat(self._descriptor).st_size:
                os.write(self._descriptor, _NOTE)

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._descriptor)


if os.name == "nt":
    import msvcrt

    def _lock_file(descriptor: int) -> None:
        # a byte far beyond the note, because nobody can read a locked byte on Windows
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock_file(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
