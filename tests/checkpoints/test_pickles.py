"""Pickles that are refused before torch reads them: no memory, no time, no calls beyond those of tensors."""

import pickle
import pickletools
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from florence2.checkpoints.checks import pickles
from florence2.checkpoints.checks.pickles import UnsafePickle, check_pickle
from florence2.checkpoints.tensors import find_weights
from florence2.errors import CheckpointError
from florence2.train.checkpoints import load_state

PROTO, STOP = b"\x80\x02", b"."


def put(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """Write a file as torch.save does, with another object."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, value in {"data.pkl": content, "version": b"3\n", "byteorder": b"little", **entries}.items():
            file.writestr(f"archive/{name}", value)
    return path


def name(text: str) -> bytes:
    module, _, attribute = text.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def call(function: str, argument: bytes) -> bytes:
    return name(function) + argument + b"\x85R"


def integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def doubled(times: int) -> bytes:
    """A tuple of itself twice, again and again: few bytes, but no end of values."""
    steps = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(times))
    return b")" + steps


GIGABYTES = 3 << 30
BOMBS: dict[str, bytes] = {
    "a bytearray": call("builtins.bytearray", integer(GIGABYTES)),
    "a tensor's class": call("torch.FloatTensor", integer(GIGABYTES)),
    "a storage": call("torch.FloatStorage", integer(1 << 20)),
    "a size": call("torch.Size", b"(K\x01l"),
    "a set": call("builtins.set", b"]"),
    "code": call("os.system", b"X\x04\x00\x00\x00true"),
    "a device": call("torch.device", b"X\x04\x00\x00\x00cuda"),
    "encoded text": name("_codecs.encode") + b"X\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R",
    "a new object": name("torch.FloatStorage") + b")\x81",
    "an extension": b"\x82\x01",
    "a call of a text": b"X\x01\x00\x00\x00a)R",
    "a state of a tensor": name("torch._utils._rebuild_parameter") + b")R}b",
    "a count of values": name("collections.OrderedDict") + b")R" + b"X\x01\x00\x00\x00a" + integer(1 << 40) + b"s",
    "an integer of 1,000 digits": b"\x8b" + struct.pack("<i", 400) + b"\x7f" * 400,
    "doubled": doubled(60),
    "doubled as a key": b"}" + doubled(60) + b"K\x01s",
    "cut short": b"}X\xff\xff\xff\x7f",
    "an empty stack": b"R",
    "a memo without a value": b"h\x07",
    "a mark in place of a value": b"(R",
}


@pytest.mark.parametrize("case", BOMBS)
def test_refused_before_memory_or_time_is_taken(case: str, tmp_path: Path) -> None:
    content = PROTO + BOMBS[case] + STOP
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + content
    (tmp_path / "old.bin").write_bytes(legacy)
    (tmp_path / "plain.bin").write_bytes(content)
    put(tmp_path / "state.pt", content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for path in (put(tmp_path / "a.bin", content), tmp_path / "old.bin", tmp_path / "plain.bin"):
        with pytest.raises(CheckpointError, match="cannot be read as a pickle of tensors"):
            find_weights(path, allow_pickle=True).read_headers()
    with pytest.raises(CheckpointError, match="not the state of a training run"):
        load_state(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    assert time.process_time() - start < 5


@pytest.mark.release
def test_a_compressed_file_is_refused_unopened(tmp_path: Path) -> None:
    path = put(tmp_path / "a.bin", bytes(1 << 28), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UnsafePickle, match="compressed"):
        check_pickle(path)


def test_an_entry_that_only_calls_itself_compressed_is_refused_too(tmp_path: Path) -> None:
    """Four bytes that take four when they are deflated: the sizes agree, the way does not."""
    path = put(tmp_path / "a.bin", b"\x80\x02}.")
    content = path.read_bytes()
    for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = content.index(mark) + place
        content = content[:at] + struct.pack("<H", zipfile.ZIP_DEFLATED) + content[at + 2 :]
    path.write_bytes(content)
    with pytest.raises(UnsafePickle, match="compressed"):
        check_pickle(path)


def small(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    monkeypatch.setattr(pickles, limit, value)


@pytest.mark.parametrize(
    ("limit", "words"),
    [("MAX_OBJECT_BYTES", "data.pkl is larger"), ("MAX_INSTRUCTIONS", "instructions"), ("MAX_VALUES", "values")],
)
def test_limits(limit: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    check_pickle(tmp_path / "a.bin")
    low, high = 1, 10_000
    while low < high:  # the smallest limit that lets the file pass
        middle = (low + high) // 2
        small(monkeypatch, limit, middle)
        try:
            check_pickle(tmp_path / "a.bin")
            high = middle
        except UnsafePickle as error:
            assert words in str(error)
            low = middle + 1
    with zipfile.ZipFile(tmp_path / "a.bin") as file:
        content = file.read("a/data.pkl")
    counts = {"MAX_OBJECT_BYTES": len(content), "MAX_INSTRUCTIONS": len(list(pickletools.genops(content)))}
    assert low == counts.get(limit, low) and 10 < low < 10_000


def test_two_objects_or_none_are_refused(tmp_path: Path) -> None:
    empty = PROTO + b"}" + STOP
    with pytest.raises(UnsafePickle, match="2 entries"):
        check_pickle(put(tmp_path / "a.bin", empty, **{"b/data.pkl": empty}))
    with zipfile.ZipFile(tmp_path / "b.bin", "w") as file:
        file.writestr("archive/version", "3")
    with pytest.raises(UnsafePickle, match="0 entries"):
        check_pickle(tmp_path / "b.bin")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "c.bin", "w") as file:
        file.writestr("archive/data.pkl", empty)
        file.writestr("archive/data.pkl", empty)
    with pytest.raises(UnsafePickle, match="overlap"):
        check_pickle(tmp_path / "c.bin")


WRITTEN: dict[str, Callable[[], Any]] = {
    "a state_dict": lambda: torch.nn.Linear(3, 3).state_dict(),
    "parameters": lambda: OrderedDict(a=torch.nn.Parameter(torch.ones(2))),
    "every type": lambda: {str(t): torch.ones(2, dtype=t) for t in (torch.bfloat16, torch.float64, torch.int64)},
    "views": lambda: {"a": torch.ones(2, 3).T, "b": torch.ones(6)[2:4]},
    "tied": lambda: dict.fromkeys("ab", torch.ones(3)),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", WRITTEN)
def test_whatever_torch_saves_of_tensors_is_read(case: str, zipped: bool, tmp_path: Path) -> None:
    tensors = WRITTEN[case]()
    torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    files = find_weights(tmp_path / "a.bin", allow_pickle=True)
    found = {name: tensor.clone() for name, tensor in files.read()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
