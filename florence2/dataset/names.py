"""Names of files made from ids: inside the folder of the view, writable everywhere, and no two the same.

An id comes from a path, a tar or a user's table and may hold anything: "..", an absolute path, NUL, a thousand letters.
"""

import hashlib
import re
import unicodedata
from pathlib import PurePosixPath

from florence2.checkpoints.files import MAX_NAME_BYTES, clip_name

MAX_PATH_BYTES = 1024
"""The longest path of a file below a view, in bytes; systems take 4,096 in all."""
_ENDING_BYTES = 40  # for a hash, and for the ending of the file that is made
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff]')  # by Windows or by UTF-8
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,200}(?:/[A-Za-z0-9_-]{1,200}){0,4}")
"""Most names: they can be written everywhere as they are, and no folder of them can have the name of a file."""
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")


class OutputNames:
    """Gives each id a path below the folder of a view, without its ending: "a/b" for "a/b.jpg".

    Ids that would share a path, as "a.jpg" and "A.png" do where letter case counts for nothing, get a hash of the id at
    the end from the second on.
    """

    def __init__(self, *, reserved: tuple[str, ...] = (), dots: bool = True):
        """Give no folder a name in `reserved`; without `dots`, replace those of the last part by "_"."""
        self.reserved, self.dots = reserved, dots
        self._files: set[str] = set()
        self._folders: set[str] = set()
        self.renamed: int = 0
        """How many ids have another name than their own, because it cannot be written or is taken."""

    def __call__(self, id_: str, unique: str | None = None) -> str:
        """Return the path of an id, which must be asked for once; `unique` is hashed where several ids may be equal."""
        own = split_suffix(id_)[0]
        key = own.lower()
        if _PLAIN.fullmatch(own) and not (key in self._files or key in self._folders or self._has_reserved(own)):
            self._files.add(key)
            return own
        name = self._safe(own)
        if len(name.encode()) > MAX_PATH_BYTES or not self._is_free(name):
            name = self._hashed(name, unique or id_)
        self.renamed += name != own
        self._take(name)
        return name

    def _has_reserved(self, own: str) -> bool:
        return any(f"{name}/" in own for name in self.reserved)

    def _safe(self, own: str) -> str:
        """Return a path without parts that leave the folder, cannot be written, or are longer than a name may be."""
        parts = [self._safe_part(part) for part in own.split("/") if part not in ("", ".")] or ["image"]
        if not self.dots:
            parts[-1] = parts[-1].replace(".", "_")
        return "/".join([*(f"{part}_" if part in self.reserved else part for part in parts[:-1]), parts[-1]])

    def _safe_part(self, part: str) -> str:
        part = _FORBIDDEN.sub("_", part)
        if part.strip(". ") == "" or part[-1] in ". ":  # such as ".."; Windows drops dots and spaces at the end
            part = f"{part.rstrip('. ')}_"
        if len(part.encode()) > MAX_NAME_BYTES - _ENDING_BYTES:
            part = f"{clip_name(part, MAX_NAME_BYTES - 2 * _ENDING_BYTES)}-{_digest(part)}"
        return part

    def _is_free(self, name: str) -> bool:
        key = _key(name)
        return key not in self._files and key not in self._folders and not any(up in self._files for up in _above(key))

    def _hashed(self, name: str, id_: str) -> str:
        """Return a name with a hash of the id, without folders where one is too deep or has the name of a file."""
        path = PurePosixPath(name)
        last = f"{clip_name(path.name, MAX_NAME_BYTES - 2 * _ENDING_BYTES)}-{_digest(id_)}"
        name = str(path.with_name(last))
        return name if len(name.encode()) <= MAX_PATH_BYTES and self._is_free(name) else last

    def _take(self, name: str) -> None:
        key = _key(name)
        self._files.add(key)
        self._folders.update(_above(key))


def split_suffix(id_: str) -> tuple[str, str]:
    """Return an id without its ending, and the ending: ("a/b", ".jpg"), or ("a/v1.2 final", "") without one."""
    dot = id_.rfind(".")
    if dot > id_.rfind("/") + 1 and _SUFFIX.fullmatch(id_, dot):
        return id_[:dot], id_[dot:]
    return id_, ""


def _key(name: str) -> str:
    return name.casefold() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _above(key: str) -> list[str]:
    """Return the folders above a path that have an ending, without it: a file made from "a" may be "a.txt" too."""
    folders = [key[:i] for i, letter in enumerate(key) if letter == "/"] if "/" in key else []
    return [stem for stem, ending in map(split_suffix, folders) if ending]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
