"""One image of a source with the questions about it, and ids that do not repeat."""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import PurePath

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


def error_item(name: str, place: str, problem: str) -> Item:
    """Return the item of an image that cannot be located; `name` stands for it in rows."""
    return Item(Source(name, Unreadable(place, problem), safe_stem(name), name), error=problem)


def safe_stem(name: str) -> str:
    """Return the stem of files made from an image, which never lead out of their folder, whatever the image's name."""
    parts = [part.replace("\0", "") for part in PurePath(name.replace("\\", "/")).parts]
    kept = [part for part in parts if part.strip("./ ") and ":" not in part]
    return "/".join(kept) or "image"


class Ids:
    """The ids of one iteration: those that repeat get numbers, so that no row takes the place of another.

    It remembers 64-bit hashes in an open table, about 16 bytes an image: a set of ten million ids takes gigabytes.
    """

    def __init__(self) -> None:
        self._slots, self._used = array("Q", bytes(8 << 10)), 0
        self._counts: dict[str, int] = {}  # of ids that repeat, where the search for a free number continues

    def distinct(self, item: Item) -> Item:
        """Return the item, with a number after its id if an earlier item had the same id and question."""
        id = whole = str(item.source.id)
        while not all(self._is_new(hash) for hash in _hashes(id, item)):
            self._counts[whole] = self._counts.get(whole, 1) + 1
            id = f"{whole}-{self._counts[whole]}"
        self._add(_hashes(id, item))
        return item if id == whole else replace(item, source=replace(item.source, id=id))

    def _is_new(self, hash: int) -> bool:
        return not self._slots[self._find(hash)]

    def _add(self, hashes: Iterator[int]) -> None:
        for hash in hashes:
            self._slots[self._find(hash)] = hash
            self._used += 1
        if self._used * 2 > len(self._slots):
            self._grow()

    def _grow(self) -> None:
        old, self._slots = self._slots, array("Q", bytes(8 * 2 * len(self._slots)))
        for hash in old:
            if hash:
                self._slots[self._find(hash)] = hash

    def _find(self, hash: int) -> int:
        """Return the slot that holds a hash, or the free one where it belongs."""
        slot = hash % len(self._slots)
        while self._slots[slot] not in (0, hash):
            slot = (slot + 1) % len(self._slots)
        return slot


def _hashes(id: str, item: Item) -> Iterator[int]:
    """Yield a hash of the id with each question; 0 means a free slot."""
    for question in item.questions or (None,):
        asked = "" if question is None else json.dumps(question.to_dict())
        digest = blake2b(f"{id}\0{asked}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        yield int.from_bytes(digest, "little") or 1
