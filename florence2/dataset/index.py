"""The rows of an output folder, found once and read again one by one: offsets are held, not rows.

A folder of a million rows is read twice, first to learn which rows count and their images' ids, then in the
order of the ids. Both take as long as parsing the JSON takes.
"""

import os
import re
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from florence2.bulk.earlier import parse_row
from florence2.errors import OptionError

_SHARD = re.compile(r"results\.(\d+)-of-(\d+)\.jsonl")
_HEAD = re.compile(
    rb'\{"image": "([^"\\]*)", "place": "([^"\\]*)", (?:"id": "([^"\\]*)", )?"task": "([^"\\]*)", '
    rb'"(?:kind": "([^"\\]*)"|(error|caption)": )'
)
"""The beginning of a line as runs write it, without an input and without escapes."""
_FURTHER = (b'"id": ', b'"input": ', b'"detail": ')
"""What may not come later in such a line."""
_AT_ONCE = 10_000  # images, whose offsets are numbers of Python at the same time
FAILED, CASCADE = "error", "cascade"
"""Kinds of rows, next to the kinds of answers."""


@dataclass(frozen=True)
class ImageRows:
    """The rows of one image, in the order in which they were asked.

    Attributes:
        id: The name of the image in every view.
        number: Its rank among the ids of the folder, from 1, the same however the rows are spread over shards.
        place: Where the image is: the absolute path of its file, or what a source calls it.
        rows: Its answered rows.
        failed: Its rows with an error.
        damaged: The number of its lines that are damaged after their beginning.
    """

    id: str
    number: int
    place: str
    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    damaged: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """The width and height of the image in pixels."""
        return size_of(self.rows[-1])

    def of_tasks(self, tasks: Collection[str]) -> "ImageRows":
        """Return the image with its rows of some tasks alone."""
        if all(row["task"] in tasks for row in self.rows) and not self.failed:
            return self
        rows, failed = ([row for row in part if row["task"] in tasks] for part in (self.rows, self.failed))
        return replace(self, rows=rows, failed=failed)


@dataclass(frozen=True)
class RowIndex:
    """Where the rows that count are, in one or several files of results.

    Attributes:
        files: The open files of results; one that is replaced meanwhile stays readable.
        ids: The ids of the images in the order of their first rows.
        lines: The (file, offset, length) of each row that counts, image by image in the order of `ids`, (R, 3).
        starts: Where the rows of each image start in `lines`, with their number at the end.
        tasks: How many rows there are of each (task, kind).
        damaged: The number of lines that are not rows, as far as their beginnings show it.
        unfinished: The number of files whose last line has no end, because a run was stopped or still writes.
        replaced: The number of rows that a later one of the same key replaces.
        moved: The ids whose rows name several places; the last one counts.
    """

    files: Sequence[BinaryIO]
    ids: Sequence[str]
    lines: Any
    starts: Any
    tasks: Mapping[tuple[str, str], int]
    damaged: int
    unfinished: int
    replaced: int
    moved: Sequence[str]

    @cached_property
    def ranks(self) -> list[int]:
        """The rank of each id, from 1, in alphabetical order."""
        ranks = [0] * len(self.ids)
        for rank, i in enumerate(sorted(range(len(self.ids)), key=self.ids.__getitem__), 1):
            ranks[i] = rank
        return ranks

    def images(self) -> Iterator[ImageRows]:
        """Read the rows of one image after another, in the order of the ids."""
        order = np.argsort(np.asarray(self.ranks))
        for first in range(0, len(order), _AT_ONCE):
            chosen = order[first : first + _AT_ONCE]
            starts, ends = self.starts[chosen].tolist(), self.starts[chosen + 1].tolist()
            for i, start, end in zip(chosen.tolist(), starts, ends, strict=True):
                lines = self.lines[start:end].tolist()
                yield self._image_rows(i, [_read_line(self.files[file], offset, size) for file, offset, size in lines])

    def _image_rows(self, i: int, lines: Sequence[dict[str, Any] | None]) -> ImageRows:
        rows = [row for row in lines if row is not None]
        failed = [row for row in rows if "error" in row]
        answered = [row for row in rows if "error" not in row] if failed else rows
        place = rows[-1]["place"] if rows else ""
        return ImageRows(self.ids[i], self.ranks[i], place, answered, failed, len(lines) - len(rows))

    def missing_shards(self) -> list[str]:
        """Return a sentence for each set of shards that is not complete."""
        parts: dict[int, set[int]] = {}
        for match in filter(None, (_SHARD.fullmatch(Path(file.name).name) for file in self.files)):
            parts.setdefault(int(match[2]), set()).add(int(match[1]))
        return [
            f"Only {len(there)} of the {count} shards results.i-of-{count}.jsonl are in the folder."
            for count, there in sorted(parts.items())
            if len(there) < count
        ]


def _read_line(file: BinaryIO, offset: int, size: int) -> dict[str, Any] | None:
    file.seek(offset)
    return parse_row(file.read(size))


class _Head(NamedTuple):
    """What an index needs of a row; `asked` holds the input and the detail of its question, if it has any."""

    name: str
    place: str
    task: str
    kind: str
    asked: str | None = None


def _head_of(row: Mapping[str, Any]) -> _Head:
    asked = row.get("input"), row.get("detail")
    return _Head(image_id(row), row["place"], row["task"], kind_of(row), None if asked == (None, None) else repr(asked))


def _read_head(line: bytes) -> _Head | None:
    """Return the head of a line, in a tenth of the time of parsing it; None where that takes parsing."""
    head = _HEAD.match(line)
    if head is None or not line.endswith(b"}\n") or any(line.find(key, head.end()) > 0 for key in _FURTHER):
        return None
    try:
        image, place, name, task, kind, other = [part.decode() for part in head.groups(b"")]
    except UnicodeDecodeError:
        return None
    return _Head(name or image or place or "image", place, task, {"": kind, "caption": CASCADE}.get(other, FAILED))


def find_results(folder: Path) -> list[Path]:
    """Return the files of results in an output folder, shards in their order. Raises OptionError without any."""
    try:
        names = os.listdir(folder)  # noqa: PTH208  names alone are enough
    except OSError as error:
        raise OptionError(
            f"{folder} cannot be read: {error.strerror}. Give an output folder of `florence2 label` or `florence2 run`."
        ) from None
    shards = {name: match for name in names if (match := _SHARD.fullmatch(name))}
    ordered = sorted(shards, key=lambda name: (int(shards[name][2]), int(shards[name][1])))
    found = [folder / name for name in ("results.jsonl", *ordered) if (folder / name).is_file()]
    if not found:
        raise OptionError(
            f"{folder} holds no results.jsonl; give an output folder of `florence2 label` or `florence2 run`."
        )
    return found


@contextmanager
def open_index(folder: Path) -> Iterator[RowIndex]:
    """Yield the rows of an output folder that count.

    Later rows replace earlier ones of the same image, task, input and detail.

    Raises:
        OptionError: The folder has no results.
        OSError: A file cannot be read.
    """
    with ExitStack() as stack:
        builder = _Builder()
        files = [stack.enter_context(path.open("rb")) for path in find_results(folder)]
        for number, file in enumerate(files):
            builder.add_file(number, file)
        yield builder.finish(files)


class _Builder:
    """The state while an index is made: places in the files, hashes of keys, the numbers of ids and of tasks."""

    def __init__(self) -> None:
        self.lines, self.images, self.keys, self.codes = (array("q") for _ in range(4))
        self.ids: dict[str, int] = {}
        self.tasks: dict[tuple[str, str], int] = {}
        self.places = array("q")  # the hash of the last place of each id
        self.moved: dict[str, None] = {}
        self.damaged = self.unfinished = 0

    def add_file(self, number: int, lines: BinaryIO) -> None:
        """Find the rows of a file."""
        offset = 0
        for line in lines:
            head = _read_head(line)
            if head is None and (row := parse_row(line)) is not None:
                head = _head_of(row)
            if head is not None:
                self.add(head)
                self.lines.extend((number, offset, len(line)))
            else:
                self.damaged += line.endswith(b"\n")
                self.unfinished += not line.endswith(b"\n")
            offset += len(line)

    def add(self, head: _Head) -> None:
        """Take a row: give numbers to its image and its task."""
        name, place, task, kind, asked = head
        place_hash = hash(place)
        image = self.ids.setdefault(name, len(self.ids))
        if image == len(self.places):
            self.places.append(place_hash)
        elif self.places[image] != place_hash:
            self.moved[name] = None
        self.images.append(image)
        self.keys.append(hash((image, task, asked)))
        self.codes.append(self.tasks.setdefault((task, kind), len(self.tasks)))

    def finish(self, files: Sequence[BinaryIO]) -> RowIndex:
        """Let the last row of each key count, and put the rows of each image together."""
        keys, images, codes = (np.asarray(values) for values in (self.keys, self.images, self.codes))
        _, from_end = np.unique(keys[::-1], return_index=True)
        kept = np.sort(len(keys) - 1 - from_end)
        kept = kept[np.argsort(images[kept], kind="stable")]
        counts = dict(zip(self.tasks, np.bincount(codes[kept], minlength=len(self.tasks)).tolist(), strict=True))
        return RowIndex(
            files,
            list(self.ids),
            np.asarray(self.lines).reshape(-1, 3)[kept],
            np.searchsorted(images[kept], np.arange(len(self.ids) + 1)),
            {task: count for task, count in counts.items() if count},
            self.damaged,
            self.unfinished,
            len(keys) - len(kept),
            list(self.moved),
        )


def image_id(row: Mapping[str, Any]) -> str:
    """Return what a row calls its image: its id, else the name or the place of the image."""
    for name in ("id", "image", "place"):
        value = row.get(name)
        if isinstance(value, str) and value:
            return value
    return "image"


def kind_of(row: Mapping[str, Any]) -> str:
    """Return the kind of a row: that of its answer, `CASCADE`, or `FAILED`."""
    if "error" in row:
        return FAILED
    return CASCADE if "caption" in row else str(row.get("kind"))


def size_of(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return the width and height that an answered row states. Raises KeyError, TypeError or ValueError without any."""
    size = row.get("caption", row)["image_size"]
    width, height = size
    if type(width) is not int or type(height) is not int or width < 1 or height < 1:
        raise ValueError("image_size must be width and height in pixels.")
    return width, height
