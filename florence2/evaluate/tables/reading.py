"""Read files that are not trusted: JSON, lines of text, XML without entities, pickles without code.

Each function raises TableError for a file that is missing, too large or damaged, and for a value of another form.
"""

import io
import json
import math
import pickle
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from xml.etree import ElementTree

from florence2.errors import clip, shown
from florence2.evaluate.tables.example import TableError

T = TypeVar("T")

MAX_BYTES = 512 << 20
"""The largest file of questions or truths that is read; the largest of the published ones has about 200 MB."""
MAX_COORDINATE = 1 << 17
"""The farthest that a corner may lie from the image's, in pixels."""
MAX_NAME_BYTES = 200
"""The longest name of an image; file systems take 255 bytes."""
MAX_SMALL_BYTES = 1 << 20
"""The largest file about one image."""
_NAMES = {int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "an object"}


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file of at most `limit` bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait, and a device may never end
            raise TableError(f"{path} is not a regular file.")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise TableError(f"{path} does not exist; `florence2 evaluate --list` names the files of each table.") from None
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError:  # a NUL in the name
        raise TableError(f"{shown(str(path))} is not the name of a file.") from None
    if len(content) > limit:
        raise TableError(f"{path} has more than {limit >> 20} MiB, the limit for such a file.")
    return content


def read_text(path: Path, limit: int = MAX_SMALL_BYTES) -> str:
    """Return the text of a file in UTF-8."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TableError(f"{path} is not text in UTF-8: {error}.") from None


def read_json(path: Path) -> Any:
    """Return the value of a JSON file."""
    try:
        return json.loads(read_text(path, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TableError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else clip(error)
        raise TableError(f"{path} is not JSON: {reason}.") from None


def read_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file. One with a document type, which could define entities, is refused."""
    parser = ElementTree.XMLParser(target=_NoDocumentType(path))
    try:
        parser.feed(read_bytes(path, MAX_SMALL_BYTES))
        root: ElementTree.Element = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        if isinstance(error, TableError):
            raise
        raise TableError(f"{path} is not XML: {clip(error)}.") from None
    return root


class _NoDocumentType(ElementTree.TreeBuilder):
    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def doctype(self, *_: Any) -> None:
        """Refuse the file, before any of its entities is defined."""
        raise TableError(f"{self._path} has a document type (<!DOCTYPE>), which annotations never need.")


_PLAIN_OPCODES = frozenset(
    b"(.012FIJKLMNSTUVXadegh]jlpqrst)u}G" + bytes([0x80, *range(0x85, 0x8C), 0x8C, 0x8D, 0x94, 0x95])
)
"""The operations of a pickle that make numbers, texts, lists, tuples and objects; none looks up a name or calls one."""


class _PlainUnpickler(pickle._Unpickler):
    """Reads pickles of plain values. The one in Python, because that in C makes room for any number in the file."""

    dispatch = {code: run for code, run in pickle._Unpickler.dispatch.items() if code in _PLAIN_OPCODES}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every name."""
        raise pickle.UnpicklingError(f"it names {clip(f'{module}.{name}', 60)}")


def read_plain_pickle(path: Path) -> Any:
    """Return the value of a pickle that holds plain values alone, as Python 2 wrote them, with texts in Latin-1."""
    content = io.BytesIO(read_bytes(path))
    try:
        return _PlainUnpickler(content, encoding="latin-1").load()
    except KeyError as error:  # an operation that is not in the table, or a value that was never stored
        code = error.args[0] if error.args else None
        reason = f"it has the operation {bytes([code])!r}" if type(code) is int and code < 256 else clip(error)
        raise TableError(f"{path} is not a pickle of plain values ({reason}); nothing of it was run.") from None
    except Exception as error:  # noqa: BLE001  a damaged pickle fails anywhere, with any error
        raise TableError(f"{path} is not a pickle of plain values ({clip(error)}); nothing of it was run.") from None


def entry(values: Mapping[Any, Any], key: str, kind: type[T], where: str) -> T:
    """Return `values[key]`, which must be of a kind; `where` names the object in the message."""
    if key not in values:
        raise TableError(f"{where} lacks {key!r}.")
    return check(values[key], kind, f"{where}.{key}")


def check(value: Any, kind: type[T], where: str) -> T:
    """Return a value, which must be of a kind. A whole number is a number too; numbers are finite and have 63 bits."""
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if kind is int and type(value) is int and abs(value) >= 1 << 63:
        raise TableError(f"{where} is {shown(value)}; whole numbers have at most 63 bits.")
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise TableError(f"{where} must be {_NAMES[kind]}, not {describe(value)}.")
    return value


def describe(value: Any) -> str:
    """Return a value for a message. A pickle may hold one list in another any number of times, so lists are counted."""
    return f"a {type(value).__name__} of {len(value):,}" if isinstance(value, list | dict | tuple) else shown(value)


def objects(values: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the objects of a list, each with its place for messages."""
    for i, value in enumerate(check(values, list, where)):
        place = f"{where}[{i}]"
        yield place, check(value, dict, place)


def texts(values: Any, where: str) -> list[str]:
    """Return a list of texts, at least one."""
    found = [check(value, str, f"{where}[{i}]") for i, value in enumerate(check(values, list, where))]
    if not found:
        raise TableError(f"{where} must hold at least one text.")
    return found


def numbers(values: Any, where: str, count: int | None = None) -> list[float]:
    """Return a list of coordinates or sizes, `count` of them if that is given."""
    found = [check(value, float, f"{where}[{i}]") for i, value in enumerate(check(values, list, where))]
    if any(abs(value) > MAX_COORDINATE for value in found):  # outlines are walked step by step
        raise TableError(f"{where} has a number beyond {MAX_COORDINATE:,} pixels.")
    if count is not None and len(found) != count:
        raise TableError(f"{where} must hold {count} numbers, not {len(found)}.")
    return found


def by_id(values: Any, where: str, key: str = "id") -> dict[int, Mapping[str, Any]]:
    """Return the objects of a list by their ids, which do not repeat."""
    found: dict[int, Mapping[str, Any]] = {}
    for place, value in objects(values, where):
        number = entry(value, key, int, place)
        if number in found:
            raise TableError(f"{place}.{key} is {number}, the id of an earlier entry too; ids must not repeat.")
        found[number] = value
    return found


def image_path(folder: Path, name: str, where: str) -> Path:
    """Return the path of an image in a folder; its name in the file must not lead out of the folder."""
    parts: Sequence[str] = PurePosixPath(name).parts
    leads_out = not parts or parts[0] == "/" or ".." in parts or any(letter in name for letter in "\\:")
    if leads_out or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
        raise TableError(f"{where} must be the name of an image, not {shown(name)}.")
    return folder / name
