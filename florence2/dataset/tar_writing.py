"""Tars of many small files. Of `tarfile` the headers alone would take half the time of the whole."""

import tarfile
from pathlib import Path

_MODE = 0o644


class TarWriter:
    """A tar whose files always have the same time and owner; the bytes are those that `tarfile` writes."""

    def __init__(self, path: Path):
        """Begin a new file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._size = path.open("wb", buffering=1 << 20), 0

    def add(self, name: str, data: bytes) -> None:
        """Add a file."""
        self._write(_header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self._size += self._file.write(data)

    def finish(self) -> None:
        """Write the end of the tar, and close the file."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._size % tarfile.RECORDSIZE))
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _header(name: str, size: int) -> bytes:
    """Return the header of a file. Those of short names in ASCII differ in few bytes, and need no extension."""
    encoded = name.encode("utf-8", "surrogateescape")
    if name.isascii() and len(name) <= tarfile.LENGTH_NAME and size < 8**11:
        octal = b"%011o" % size
        total = _EMPTY_SUM + sum(encoded) + sum(octal) - 11 * ord("0")
        return b"%b%b%b%b%06o\0 %b" % (
            encoded.ljust(tarfile.LENGTH_NAME, b"\0"),
            _EMPTY[100:124],
            octal,
            _EMPTY[135:148],
            total,
            _EMPTY[156:],
        )
    return _info(name, size).tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, _MODE
    return info


_EMPTY = _info("", 0).tobuf(tarfile.USTAR_FORMAT)
_EMPTY_SUM = tarfile.calc_chksums(_EMPTY)[0]  # type: ignore[attr-defined]
