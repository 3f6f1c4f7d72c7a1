"""WebDataset tars: each image in them is an item, read from where it stands in the file.

The headers are read here and not by `tarfile.open`, which keeps every member and reads extended headers of any size.
Nothing is ever unpacked, so a member's name leads nowhere.
"""

import os
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from florence2.bulk.sources import FileVersion, Source
from florence2.errors import ImageError, clip
from florence2.inputs.formats import image_suffixes
from florence2.label.sources.item import Ids, Item, error_item, safe_stem

MAX_MEMBER_BYTES = 256 << 20
MAX_HEADER_BYTES = 1 << 20
"""The longest extended header, which holds little more than a name."""
_BLOCK = tarfile.BLOCKSIZE
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_NO_MEMBERS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_SIZE = re.compile(r"\d{1,19}")
KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""WebDataset's rule: all that is before the first dot of the last name is the key of a sample."""
_META = re.compile(r"__[^/]*__($|/)")
"""What WebDataset passes over."""


@dataclass(frozen=True)
class TarImage:
    """The `Source.data` of an image in a tar: `size` bytes from `offset` of it; `modified` is what the tar states."""

    path: Path
    name: str
    offset: int
    size: int
    modified: int = 0

    @property
    def place(self) -> str:
        """The absolute path of the tar, two colons, and the member's name."""
        return f"{self.path.absolute()}::{self.name}"

    @property
    def version(self) -> FileVersion:
        """The size and time that the tar states: those of the tar change with every image that is added to it."""
        return 0, self.size, self.modified

    def read(self) -> bytes:
        """Return the bytes of the image. Raises ImageError."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ImageError(f"{self.path} cannot be read: {error.strerror}.") from None
        if len(data) < self.size:
            raise ImageError(f"{self.path} has become shorter since {self.name} was found in it.")
        return data


def read_tar(path: Path, prefix: str = "", extensions: Collection[str] = ()) -> Iterator[Item]:
    """Yield the images of a tar in their order.

    The first image of a sample has the sample's key as its id, each further one its name in the tar.

    Args:
        path: The tar.
        prefix: Begins every id, such as the tar's own name where there are several.
        extensions: Those of the members to take, in WebDataset's sense: "jpg" or "left.jpg". Without any, all members
            that end as images do are taken.
    """
    names = Ids()
    taken, sample, used = False, "", False  # the key of the sample that is read, and whether an image has it as its id
    wanted = {extension.lower() for extension in extensions}
    suffixes = image_suffixes()
    try:
        for member in _read_members(path):
            split = None if _META.match(member.name) else KEY.match(member.name)
            if split is None:
                continue
            key, extension = split[1], split[2].lower()
            used = used and key == sample
            sample = key
            if (extension in wanted) if wanted else (f".{extension.rpartition('.')[2]}" in suffixes):
                yield _item(path, member, names.distinct(member.name), prefix + (member.name if used else key))
                used = taken = True
    except ImageError as error:
        yield error_item(str(path), str(path.absolute()), str(error))
    else:
        if not taken:
            kind = f"no member with the extension {' or '.join(sorted(wanted))}" if wanted else "no image"
            yield error_item(str(path), str(path.absolute()), f"{path} holds {kind}.")


class _TarMember(NamedTuple):
    name: str
    offset: int
    size: int
    problem: str | None
    modified: int


def _item(path: Path, member: _TarMember, name: str, id: str) -> Item:
    image = TarImage(path, name, member.offset, member.size, member.modified)
    shown = f"{path}::{name}"
    if member.problem is not None:
        return error_item(shown, image.place, f"{clip(shown)} {member.problem}", id)
    return Item(Source(shown, image, safe_stem(id), id))


def _read_members(path: Path) -> Iterator[_TarMember]:
    """Yield all members but folders. Raises ImageError where the tar cannot be read further."""
    try:
        with path.open("rb") as file:
            yield from _Reader(path, file)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}.") from None


class _Reader:
    """One pass over the headers of a tar; the data between them is not read."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._end = os.fstat(file.fileno()).st_size
        self._position = 0
        self._forget()

    def __iter__(self) -> Iterator[_TarMember]:
        while (header := self._next_header()) is not None:
            info, sparse = header
            if info.type in _NO_MEMBERS:
                self._read_extended(info)
                continue
            size = info.size if self._size is None else self._size
            start = self._position
            self._position += 0 if info.type in _WITHOUT_DATA else _whole_blocks(size)
            torn = start + size > self._end and info.type not in _WITHOUT_DATA
            if not info.isdir():
                name = info.name if self._name is None else self._name
                problem = self._problem or ("is cut off: the tar ends in it." if torn else _problem(info, size))
                problem = _SPARSE if sparse or self._sparse else problem
                yield _TarMember(name, start, size, problem, int(info.mtime) * 10**9)
            if torn:
                return
            self._forget()

    def _forget(self) -> None:
        """Reset what extended headers say of the next member."""
        self._name: str | None = None
        self._size: int | None = None
        self._sparse = False
        self._problem: str | None = None

    def _next_header(self) -> tuple[tarfile.TarInfo, bool] | None:
        """Return the header at the present position, and whether it is one of a sparse file; None at the end mark."""
        block = self._read(_BLOCK)
        if not block:
            raise ImageError(f"{self._path} has no end mark; it seems to be cut off, after a whole number of files.")
        if block == bytes(_BLOCK):
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise self._damaged() from None
        if info.size < 0:
            raise self._damaged()
        sparse = info.type == tarfile.GNUTYPE_SPARSE
        more = sparse and block[482]  # the map of the parts has further blocks
        while more:
            extension = self._read(_BLOCK)
            more = len(extension) == _BLOCK and extension[504]
        return info, sparse

    def _read_extended(self, info: tarfile.TarInfo) -> None:
        """Read the name and size that an extended header gives to the next member."""
        if info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK) or info.size > MAX_HEADER_BYTES:
            self._position += _whole_blocks(info.size)
            if info.size > MAX_HEADER_BYTES:
                self._problem = f"has a header of {info.size:,} bytes; the limit is {MAX_HEADER_BYTES >> 20} MiB."
            return
        data = self._read(_whole_blocks(info.size))[: info.size]
        if len(data) < info.size:
            raise self._damaged()
        if info.type == tarfile.GNUTYPE_LONGNAME:
            self._name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            return
        for key, value in self._records(data):
            if key == "size" and not _SIZE.fullmatch(value):
                raise self._damaged()
            self._name = value.rstrip("/") if key == "path" else self._name
            self._size = int(value) if key == "size" else self._size
            self._sparse |= key.startswith("GNU.sparse.")

    def _records(self, data: bytes) -> Iterator[tuple[str, str]]:
        """Yield the records of a PAX header: "30 path=..." and a newline, where 30 counts all of the record."""
        start = 0
        while start < len(data) and data[start]:
            space = data.find(b" ", start, start + 20)
            length = data[start:space]
            if space < 0 or not length.isdigit() or data[start + int(length) - 1 : start + int(length)] != b"\n":
                raise self._damaged()
            key, _, value = data[space + 1 : start + int(length) - 1].partition(b"=")
            yield key.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")
            start += int(length)

    def _read(self, size: int) -> bytes:
        self._file.seek(self._position)
        data = self._file.read(size)
        self._position += len(data)
        return data

    def _damaged(self) -> ImageError:
        where = f"at byte {self._position:,}"
        if self._position >= self._end:
            return ImageError(f"{self._path} is cut off: it ends in a header, {where}. Get the whole file again.")
        return ImageError(f"{self._path} is not a tar, or is damaged {where}; nothing after that is read.")


_SPARSE = "is stored as a sparse file, which is not read here; pack the tar again without --sparse."


def _problem(info: tarfile.TarInfo, size: int) -> str | None:
    """Return why a member is not read; None for a regular file of a fair size."""
    if info.islnk() or info.issym():
        return f"is a link to {clip(info.linkname)!r}, and links in a tar are not followed."
    if not info.isreg():
        return "is a device or another special file, not an image."
    if size > MAX_MEMBER_BYTES:
        return f"has {size:,} bytes; the limit is {MAX_MEMBER_BYTES >> 20} MiB."
    return None


def _whole_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
