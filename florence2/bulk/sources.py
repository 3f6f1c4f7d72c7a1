"""From the paths on a command line to the images to read: files, folders, stdin."""

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from florence2.errors import ImageError
from florence2.inputs.files import read_data_url, short_name, url_problem
from florence2.inputs.formats import image_suffixes

MAX_STDIN_BYTES = 256 << 20


@dataclass(frozen=True)
class Source:
    """One image to read.

    `name` is how the image is reported, `data` its path or its bytes, and `stem` the name of files made from it.
    """

    name: str
    data: Path | bytes
    stem: str

    @property
    def place(self) -> str:
        """Identify the image among all others: its absolute path, or the hash of its bytes."""
        if isinstance(self.data, bytes):
            return f"sha256:{hashlib.sha256(self.data).hexdigest()}"
        return str(self.data.absolute())


def find_images(arguments: Sequence[str]) -> list[Source]:
    """Return the images that command line arguments name.

    Args:
        arguments: Files, folders, data URLs, or "-" for an image on stdin. A folder stands for all files in and below
            it that have an image's ending, in alphabetical order.

    Returns:
        One source for each image, with distinct stems. A file that does not exist is included; reading it fails later.

    Raises:
        ImageError: An argument is empty or a URL to fetch, a folder holds no image, or stdin holds more than
            `MAX_STDIN_BYTES`.
    """
    sources: list[Source] = []
    for argument in arguments:
        if argument[:5].lower() == "data:":
            sources.append(Source(short_name(argument, 40), read_data_url(argument).getvalue(), "data"))
            continue
        if problem := url_problem(argument):
            raise ImageError(problem)
        path = Path(argument)
        if argument == "-":
            sources.append(Source("-", _read_stdin(), "stdin"))
        elif path.is_dir():
            sources += _find_in_folder(path)
        else:
            sources.append(Source(argument, path, path.stem))
    return _with_distinct_stems(sources)


def _find_in_folder(folder: Path) -> list[Source]:
    suffixes = image_suffixes()
    names = (Path(root, name) for root, _, names in os.walk(folder, onerror=_refuse) for name in names)
    files = sorted(file for file in names if file.suffix.lower() in suffixes and file.is_file())
    if not files:
        raise ImageError(f"The folder {folder} holds no image: no file ends in {_list_common(suffixes)}.")
    return [Source(str(file), file, str(file.relative_to(folder).with_suffix(""))) for file in files]


def _refuse(error: OSError) -> NoReturn:
    raise ImageError(f"The folder {error.filename} cannot be read: {error.strerror}.")


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
    distinct = []
    for source in sources:
        stem, count = source.stem, 1
        while stem in taken:
            count += 1
            stem = f"{source.stem}-{count}"
        taken.add(stem)
        distinct.append(replace(source, stem=stem))
    return distinct
