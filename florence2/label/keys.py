"""Questions about images as 64-bit numbers, so that a million finished ones fit into a few megabytes.

Of ten million questions two share a number with a probability of 1 in 400,000; the later one would then count as
finished.
"""

import json
import re
import zlib
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

from florence2.bulk.sources import FileVersion, Source

_IN_FILE = re.compile(r"\.(tar|parquet)::", re.IGNORECASE)
By: TypeAlias = Literal["place", "id"]
FAILED, UNVERSIONED = 0, 1
"""States of rows that have an error, and of answers about images without a version, such as those in tables."""


def question_part(asked: Mapping[str, Any]) -> bytes:
    """Return the part of a key that a question makes; `asked` holds what `Question.to_dict` returns."""
    return json.dumps([asked.get(part) for part in ("task", "input", "detail")]).encode()


def source_key(source: Source, part: bytes, by: By) -> int:
    """Return the key of a question, given by its `question_part`, about an image."""
    return _key(source.place, source.id, part, by)


def row_key(row: Mapping[str, Any], by: By) -> int:
    """Return the key of a row in the form of `Row.to_dict`."""
    return _key(row["place"], row.get("id"), question_part(row), by)


def row_state(row: Mapping[str, Any]) -> int:
    """Return which version of the image's file a row answers, as a number; `FAILED` for an error."""
    if "error" in row:
        return FAILED
    file = row.get("file")
    return _state(file.get("bytes"), file.get("modified_ns")) if isinstance(file, dict) else UNVERSIONED


def version_state(version: FileVersion) -> int:
    """Return the state of an answer about this version of an image's file."""
    return _state(*version[1:])


def _key(place: str, id: str | None, part: bytes, by: By) -> int:
    image = [None, id] if by == "id" else [place, None if _is_derived(id, place) else id]
    digest = blake2b(json.dumps(image).encode() + part, digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1  # 0 stands for a damaged line


def _is_derived(id: str | None, place: str) -> bool:
    """Return whether an id says no more than the place: a part of its path, which depends on all that is labelled.

    An image in a tar or a table has a place of its own, whatever its id.
    """
    return id is None or place.endswith((f"/{id}", f"\\{id}")) or _IN_FILE.search(place) is not None


def _state(size: Any, modified: Any) -> int:
    return max(zlib.crc32(f"{size},{modified}".encode()), UNVERSIONED + 1)
