"""One image of a source with the questions about it, and ids that do not repeat."""

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path, PurePath

from florence2.bulk.rows import TaskQuestion
from florence2.bulk.sources import Source
from florence2.errors import ImageError


@dataclass(frozen=True)
class Item:
    """An image to label.

    Two items of one iteration never have the same id and question. They may have the same place: an image that is
    named twice, or that a list asks about under two ids.

    Attributes:
        source: Identifies the image; `source.content()` returns what to open. `source.id` is never None.
        questions: The image's own questions, from JSON Lines; None stands for those of the command.
        error: Why the image cannot be located, such as in a torn tar. It makes one error row, whatever is asked.
    """

    source: Source
    questions: tuple[TaskQuestion, ...] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Unreadable:
    """The `Source.data` of an image that cannot be located: its place, and the sentence that says why."""

    place: str
    problem: str

    def read(self) -> bytes:
        """Raise ImageError."""
        raise ImageError(self.problem)


def file_item(path: Path, id: str) -> Item:
    """Return the item of an image in a file of its own."""
    return Item(Source(str(path), path, safe_stem(os.path.splitext(id)[0]), id))  # noqa: PTH122  an id is not a path


def file_id(path: str, root: str) -> str:
    """Return the path of a file below the root, and the whole path of another, with "/" on every system."""
    whole = os.path.abspath(path)  # noqa: PTH100  without ".." in it
    below = bool(root) and f"{whole}{os.sep}".startswith(root if root.endswith(os.sep) else root + os.sep)
    return (os.path.relpath(whole, root) if below else whole).replace(os.sep, "/")


def error_item(name: str, place: str, problem: str, id: str | None = None) -> Item:
    """Return the item of an image that cannot be located; `name` is also its id if it has none."""
    id = name if id is None else id
    return Item(Source(name, Unreadable(place, problem), safe_stem(id), id), error=problem)


def safe_stem(name: str) -> str:
    """Return the stem of files made from an image, which never lead out of their folder, whatever the image's name."""
    parts = [part.replace("\0", "") for part in PurePath(name.replace("\\", "/")).parts]
    kept = [part for part in parts if part.strip("./ ") and ":" not in part]
    return "/".join(kept) or "image"


class Ids:
    """The ids of one iteration: those that repeat get numbers, so that no row takes the place of another.

    It remembers 64-bit hashes in an open table, about 20 bytes an id: a set of ten million ids takes gigabytes.
    """

    def __init__(self) -> None:
        self._slots, self._used = array("Q", bytes(8 << 10)), 0
        self._counts: dict[str, int] = {}  # of ids that repeat, where the search for a free number continues

    def distinct(self, id: str, asked: Sequence[str] = ("",)) -> str:
        """Return the id, with a number after it if it was given before with one of the same questions."""
        whole = id
        while any(self._slots[self._find(hash)] for hash in _hashes(id, asked)):
            self._counts[whole] = self._counts.get(whole, 1) + 1
            id = f"{whole}-{self._counts[whole]}"
        for hash in _hashes(id, asked):
            self._add(hash)
        return id

    def _add(self, hash: int) -> None:
        slot = self._find(hash)
        self._used += not self._slots[slot]
        self._slots[slot] = hash
        if self._used * 3 > len(self._slots) * 2:
            old, self._slots = self._slots, array("Q", bytes(8 * 2 * len(self._slots)))
            for each in old:
                self._slots[self._find(each)] = each

    def _find(self, hash: int) -> int:
        """Return the slot that holds a hash, or the free one where it belongs."""
        slot = hash % len(self._slots)
        while self._slots[slot] not in (0, hash):
            slot = (slot + 1) % len(self._slots)
        return slot


def with_distinct_id(item: Item, ids: Ids) -> Item:
    """Return the item, with a number after its id if an earlier item had the same id and question."""
    asked = [json.dumps(question.to_dict()) for question in item.questions or ()] or [""]
    id = ids.distinct(str(item.source.id), asked)
    return item if id == item.source.id else replace(item, source=replace(item.source, id=id))


def _hashes(id: str, asked: Sequence[str]) -> Iterator[int]:
    """Yield a hash of the id with each question; 0 means a free slot."""
    for question in asked:
        digest = blake2b(f"{id}\0{question}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        yield int.from_bytes(digest, "little") or 1
