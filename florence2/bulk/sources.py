"""From the paths on a command line to the images to read: files, folders, stdin."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from florence2.errors import ImageError
from florence2.inputs.files import read_data_url, short_name, url_problem
from florence2.inputs.formats import image_suffixes
from florence2.inputs.image import open_image

MAX_STDIN_BYTES = 256 << 20
_MOST_KINDS = 100  # endings that are counted, and
_SHOWN_KINDS = 6  # those that a message names
DATASET_MARK = ".florence2-dataset"
"""A file in the folders that `florence2 dataset` writes: the images in them are those that were labelled before."""
_HEIC = {".heic", ".heif", ".hif"}

FileVersion: TypeAlias = tuple[int, int, int]
"""The inode, size and time of the last change of a file, which differ after it was written again."""


class Member(Protocol):
    """An image inside another file, such as a tar; its bytes are read only where they are needed."""

    @property
    def place(self) -> str:
        """Identify the image among all others: the absolute path of the file, and what names the image in it."""
        ...

    def read(self) -> bytes:
        """Return the bytes of the image. Raises ImageError."""
        ...


@dataclass(frozen=True)
class Source:
    """One image to read.

    Attributes:
        name: How the image is reported.
        data: Its path, its bytes, or what reads it from inside another file.
        stem: The name of files made from it.
        id: What its rows call it, wherever its files are moved: the path below the input, the key in a tar; None where
            rows have no ids.
    """

    name: str
    data: Path | bytes | Member
    stem: str
    id: str | None = None

    @property
    def place(self) -> str:
        """Identify the image among all others: its absolute path, or the hash of its bytes."""
        if isinstance(self.data, bytes):
            return f"sha256:{hashlib.sha256(self.data).hexdigest()}"
        return str(self.data.absolute()) if isinstance(self.data, Path) else self.data.place

    def content(self) -> Path | bytes:
        """Return what to open: the path of the image's file, or the image's bytes. Raises ImageError."""
        return self.data if isinstance(self.data, Path | bytes) else self.data.read()

    def version(self) -> FileVersion | None:
        """Return the present version of the image; None where its file is not there, and for one that has none."""
        if not isinstance(self.data, Path):
            version: FileVersion | None = getattr(self.data, "version", None)  # of an image in a tar
            return version
        try:
            status = self.data.stat()
        except (OSError, ValueError):
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


def find_images(
    arguments: Sequence[str],
    *,
    passed_over: Callable[[Path], None] = lambda _: None,
    output: Path | None = None,
) -> list[Source]:
    """Return the images that command line arguments name.

    Args:
        arguments: Files, folders, data URLs, or "-" for an image on stdin. A folder stands for all files in and below
            it that have an image's ending, in alphabetical order.
        passed_over: Called with each file or link in a folder that is not taken, unless its name begins with a dot.
        output: The output folder of the run. Files in it are not taken, except where an argument names them.

    Returns:
        One source for each image, with distinct stems. A file that does not exist is included; reading it fails later.

    Raises:
        ImageError: An argument is empty or a URL to fetch, a folder holds no image, or stdin holds more than
            `MAX_STDIN_BYTES`.
    """
    sources: list[Source] = []
    for argument in arguments:
        if not argument:
            raise ImageError('The name of an image is empty (""); give a file, a folder, or - for stdin.')
        if argument[:5].lower() == "data:":
            sources.append(Source(short_name(argument, 40), read_data_url(argument).getvalue(), "data"))
            continue
        if problem := url_problem(argument):
            raise ImageError(problem)
        path = Path(argument)
        if argument == "-":
            sources.append(Source("-", _read_stdin(), "stdin"))
        elif os.path.isdir(argument):  # noqa: PTH112  Path.is_dir raises for a name that is too long
            sources += _find_in_folder(path, passed_over, output)
        else:
            sources.append(Source(argument, path, path.stem))
    return _with_distinct_stems(sources)


def _find_in_folder(folder: Path, passed_over: Callable[[Path], None], output: Path | None) -> list[Source]:
    taken: list[Path] = []
    others = PassedOver()
    for entry in walk_folder(folder, output):
        if entry.error is not None:
            raise ImageError(entry.error)
        if entry.is_image:
            taken.append(entry.path)
        else:
            others(entry.path)
            passed_over(entry.path)
    if not taken:
        raise no_image(folder, others)
    return [Source(str(file), file, str(file.relative_to(folder).with_suffix(""))) for file in taken]


def no_image(folder: Path, others: "PassedOver") -> ImageError:
    """Return the error of a folder that holds no image but `others`."""
    held = f" {others.describe()}" if others.count else ""
    return ImageError(f"The folder {folder} holds no image: no file ends in {_list_common(image_suffixes())}.{held}")


class FolderEntry(NamedTuple):
    """A file in or below a folder, or a folder that cannot be read; `error` says why."""

    path: Path
    is_image: bool
    error: str | None = None


def walk_folder(folder: Path, output: Path | None = None) -> Iterator[FolderEntry]:
    """Yield the files in and below a folder in alphabetical order, with one folder's names in memory at a time.

    Links to folders are yielded, not followed. Hidden files that are not images are left out, and so are the folder
    `output`, because drawings of an earlier run are not input, and folders below with a `DATASET_MARK`.
    """
    suffixes = image_suffixes()
    left = [iter(_list_folder(folder))]  # a list, because folders may be nested deeper than calls
    while left:
        entry = next(left[-1], None)
        if entry is None:
            left.pop()
        elif isinstance(entry, FolderEntry):
            yield entry
        elif entry.is_dir(follow_symlinks=False):
            held = () if output is not None and _is_same(Path(entry), output) else _list_folder(Path(entry))
            if not any(isinstance(each, os.DirEntry) and each.name == DATASET_MARK for each in held):
                left.append(iter(held))
        elif os.path.splitext(entry.name)[1].lower() in suffixes and _is_file(entry):  # noqa: PTH122  faster than a Path
            yield FolderEntry(Path(entry), True)
        elif not entry.name.startswith("."):
            yield FolderEntry(Path(entry), False)


def _list_folder(folder: Path) -> Sequence["os.DirEntry[str] | FolderEntry"]:
    """Return what a folder holds, by name; where it cannot be read, an entry that says why."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        return [FolderEntry(folder, False, f"The folder {folder} cannot be read: {error.strerror}.")]


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # such as a loop of links
        return False


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # the output folder is not there yet
        return False


class PassedOver:
    """Counts files that are not taken, by their endings: of millions it keeps one name for each ending.

    Attributes:
        count: The number of files.
    """

    def __init__(self) -> None:
        self.count = 0
        self._kinds: dict[str, tuple[int, str]] = {}

    def __call__(self, path: Path) -> None:
        """Count one file."""
        self.count += 1
        ending = path.suffix.lower()
        if ending in self._kinds or len(self._kinds) < _MOST_KINDS:
            count, name = self._kinds.get(ending, (0, path.name))
            self._kinds[ending] = count + 1, name

    def describe(self) -> str:
        """Return "3 files were passed over, ...: 2 .txt (a.txt, ...), 1 .zip (b.zip).", the most frequent first."""
        shown = sorted(self._kinds.items(), key=lambda kind: -kind[1][0])[:_SHOWN_KINDS]
        kinds = ", ".join(
            f"{count} {ending or 'without an ending'} ({name}{', ...' if count > 1 else ''})"
            for ending, (count, name) in shown
        )
        rest = self.count - sum(count for _, (count, _) in shown)
        more = f", and {rest} of other kinds" if rest else ""
        hint = " Convert HEIC images to JPEG first." if self._kinds.keys() & _HEIC else ""
        were = "1 file was" if self.count == 1 else f"{self.count} files were"
        reason = "it is not an image" if self.count == 1 else "they are not images"
        return f"{were} passed over, because {reason} of a format that is read here: {kinds}{more}.{hint}"


def find_unreadable(sources: Iterable[Source]) -> Mapping[Source, str]:
    """Return why each source cannot be read if none can; an empty mapping as soon as one can."""
    errors: dict[Source, str] = {}
    for source in sources:
        error = _read_error(source)
        if error is None:
            return {}
        errors[source] = error
    return errors


def _read_error(source: Source) -> str | None:
    try:
        open_image(source.content())
    except ImageError as error:
        return str(error)
    return None


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise ImageError("The image is to be read from stdin, but stdin is closed.")
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise ImageError(f"The image on stdin has more than {MAX_STDIN_BYTES >> 20} MiB.")
    return data


def _list_common(suffixes: Iterable[str]) -> str:
    common = [suffix for suffix in (".jpg", ".png", ".webp", ".tif") if suffix in suffixes]
    return ", ".join(common) + " or another format that is opened here"


def _with_distinct_stems(sources: Iterable[Source]) -> list[Source]:
    """Add numbers to stems that occur more than once, so that no two images give files of the same name."""
    taken: set[str] = set()
    counts: Counter[str] = Counter()  # where the search for a free number continues
    distinct = []
    for source in sources:
        stem = source.stem
        while stem in taken:
            counts[source.stem] += 1
            stem = f"{source.stem}-{counts[source.stem] + 1}"
        taken.add(stem)
        distinct.append(replace(source, stem=stem))
    return distinct
