"""Look through a pickle before torch reads it: tensors alone, and no more memory or time than its size warrants.

torch's own restricted reader (`weights_only=True`) runs no code, but calls allowed types with any arguments and unpacks
compressed entries: a file of 60 bytes can take gigabytes before it is refused. Here the instructions are followed
without carrying them out. Nothing here imports torch.
"""

import pickletools
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

MAX_OBJECT_BYTES = 64 << 20
"""The largest `data.pkl`, which holds names and shapes; base's has 0.1 MB."""
MAX_INSTRUCTIONS = 1_000_000
"""The most instructions of a pickle; a checkpoint with 1,000 tensors has 30,000."""
MAX_VALUES = 10_000_000
"""The most values of a pickle, those counted twice that it refers to twice."""
_MIN_COUNT = 1 << 20  # whole numbers up to here need no justification by the size of the file

_CALLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_STORAGE = re.compile(r"torch \w+Storage|torch\.storage (Untyped|Typed)Storage")
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which torch begins files before release 1.6
_LEGACY_PARTS = 4  # that number, the protocol, the sizes of types, and the object; raw values follow
_ALLOWED = frozenset(
    """
    APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE BUILD EMPTY_DICT EMPTY_LIST
    EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK NEWFALSE NEWTRUE NONE PROTO REDUCE SETITEM SETITEMS
    SHORT_BINSTRING STOP TUPLE TUPLE1 TUPLE2 TUPLE3
    """.split()
)


class UnsafePickle(ValueError):
    """The reason why a pickle is not read, as the end of a sentence without its full stop."""


@dataclass(slots=True)
class _Item:
    """A value on the stack: how many values it holds, and the name of a global or of what it was made by."""

    weight: int = 1
    name: str = ""


def check_pickle(path: Path) -> None:
    """Raise UnsafePickle for a file that holds more than tensors, lists, dicts, texts and numbers, or is a bomb."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            _follow(BytesIO(_read_object(file, size)), size)
            return
        file.seek(0)
        if file.read(len(_LEGACY)) != _LEGACY:
            raise UnsafePickle("torch.save did not write it")
        file.seek(0)
        for _ in range(_LEGACY_PARTS):
            _follow(file, size)


def _read_object(file: Any, size: int) -> bytes:
    """Return the entry `data.pkl` of a zip whose entries are all stored as they are, and fit into the file."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(
            entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries
        ):
            raise UnsafePickle("it is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > size or len({e.filename for e in entries}) < len(entries):
            raise UnsafePickle("its entries overlap")
        objects = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(objects) != 1:
            raise UnsafePickle(f"it holds {len(objects)} entries data.pkl, not one")
        if objects[0].file_size > MAX_OBJECT_BYTES:
            raise UnsafePickle(f"its data.pkl is larger than {MAX_OBJECT_BYTES >> 20} MiB")
        return archive.read(objects[0])


def _follow(stream: BufferedIOBase | Any, size: int) -> None:
    """Follow the instructions up to the end of one pickle, without carrying them out."""
    stack: list[_Item | None] = []  # None is a mark
    memo: dict[int, _Item] = {}
    try:
        for op, argument in _instructions(stream, size):
            if op.name.endswith("PUT"):
                memo[argument] = _top(stack)
            elif op.name.endswith("GET"):
                stack.append(memo[argument])
            elif op.name != "PROTO":
                _step(op, argument, stack)
    except (IndexError, KeyError):
        raise UnsafePickle("it is damaged") from None


def _instructions(stream: Any, size: int) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """Yield the instructions of one pickle with their arguments; refuse those that torch.save does not use."""
    for count, (op, argument, _) in enumerate(pickletools.genops(stream)):
        if count >= MAX_INSTRUCTIONS:
            raise UnsafePickle(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        if op.name not in _ALLOWED:
            raise UnsafePickle(f"it uses the instruction {op.name}, which torch.save does not")
        # sizes, strides and offsets count values in the file; the legacy header has one number of 80 bits
        if type(argument) is int and not (op.name == "LONG1" and count == 1) and abs(argument) > max(size, _MIN_COUNT):
            raise UnsafePickle("it states more values than the file can hold")
        yield op, argument


def _step(op: pickletools.OpcodeInfo, argument: Any, stack: list[_Item | None]) -> None:
    """Take from the stack what an instruction takes, and put there what it makes."""
    if op.name == "MARK":
        stack.append(None)
        return
    taken = _take(op, stack)
    if op.name == "GLOBAL":
        if argument not in _CALLED and not _STORAGE.fullmatch(argument):
            raise UnsafePickle(f"it names {argument.replace(' ', '.')}, which no tensor needs")
        stack.append(_Item(name=argument))
    elif op.name == "REDUCE" and taken[0].name not in _CALLED:
        raise UnsafePickle("it calls something else than a tensor's own functions")
    elif op.name == "BUILD" and taken[0].name != "result of collections OrderedDict":
        raise UnsafePickle("it changes the state of something else than a dict")
    elif op.stack_after:
        weight = sum(item.weight for item in taken)
        # a list or a dict grows in place, so that every reference to it sees the larger weight
        grows = op.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")
        made = taken[0] if grows else _Item(name=f"result of {taken[0].name}" if op.name == "REDUCE" else "")
        made.weight = weight + (0 if grows else 1)
        if made.weight > MAX_VALUES:
            raise UnsafePickle(f"it holds more than {MAX_VALUES:,} values, counted as often as they are referred to")
        stack.append(made)


def _take(op: pickletools.OpcodeInfo, stack: list[_Item | None]) -> list[_Item]:
    """Remove and return what an instruction takes, the lowest first."""
    before = op.stack_before
    taken: list[_Item] = []
    fixed = len(before)
    if pickletools.markobject in before:
        while (item := stack.pop()) is not None:
            taken.append(item)
        fixed = before.index(pickletools.markobject)
    for _ in range(fixed):
        taken.append(_top(stack))
        stack.pop()
    return taken[::-1]


def _top(stack: list[_Item | None]) -> _Item:
    item = stack[-1]
    if item is None:
        raise IndexError
    return item
