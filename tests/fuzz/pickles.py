"""Weights and training states in pickles: programs instead of tensors, bombs, spoilt bytes. No code of a file runs."""

import io
import pickle
import zipfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

import florence2
from florence2.checkpoints.describe import describe_checkpoint
from florence2.checkpoints.tensors import WeightFiles
from florence2.train.checkpoints import load_state
from tests.fuzz import material, values
from tests.fuzz.worker import expect

_CALLS = (
    ("os", "system", ("touch canary",)),
    ("posix", "system", ("touch canary",)),
    ("subprocess", "Popen", (["touch", "canary"],)),
    ("builtins", "eval", ("open('canary', 'w')",)),
    ("builtins", "exec", ("open('canary', 'w')",)),
    ("builtins", "open", ("canary", "w")),
    ("io", "open", ("canary", "w")),
    ("pathlib", "Path.touch", ("canary",)),
    ("shutil", "copy", ("/etc/hostname", "canary")),
    ("socket", "create_connection", (("127.0.0.1", 9),)),
    ("torch.hub", "load", ("a/b", "c")),
    ("torch", "load", ("canary",)),
    ("torch.serialization", "load", ("canary",)),
    ("torch._inductor.codecache", "PyCodeCache.load", ("open('canary','w')",)),
    ("torch.utils.cpp_extension", "load_inline", ("canary", "int f();")),
    ("numpy", "save", ("canary", 1)),
    ("florence2.cli.main", "main", (["init", "canary", "--preset", "tiny"],)),
    ("florence2.checkpoints.checks.functions", "find_function", ("os:system",)),
    ("builtins", "bytearray", (3 << 30,)),
    ("builtins", "range", (1 << 62,)),
    ("torch", "zeros", (1 << 40,)),
    ("torch", "FloatTensor", (1 << 34,)),
    ("torch.nn.modules.linear", "Linear", (1 << 17, 1 << 17)),
    ("collections", "OrderedDict", ()),
    ("collections", "deque", (range(9),)),
)
_TARGETS = ("headers", "load", "describe", "named", "state")


def draw(random: Random) -> tuple[str, bytes]:
    """(what reads it, the bytes of the file)."""
    target = random.choice(_TARGETS)
    kind = random.randrange(9)
    if kind < 4:
        call = random.choice(_CALLS)
        data = _program(call, random.choice((0, 2, 4)), random.choice(("bare", "value", "nested", "build")))
        return target, _in_zip(data, random.choice((False, False, True))) if random.random() < 0.7 else data
    good = good_file("state" if target == "state" else random.choice(("zip", "old")))
    if kind == 4:
        return target, values.change_bytes(random, good, 3000)
    if kind == 5:
        return target, _rezip(random, good) if good[:2] == b"PK" else values.change_bytes(random, good, 300)
    if kind == 6:
        return target, _saved(random)
    if kind == 7:
        return target, random.choice(
            (bomb(30), bomb(26), b"", b"PK\x03\x04", b"\x80\x02.", b"(" * 100_000, deep(50_000))
        )
    return target, good


def _program(call: tuple[str, str, Any], protocol: int, form: str) -> bytes:
    """A pickle that calls a function, alone, as a value, within a state, or by BUILD."""
    module, name, arguments = call
    head = bytes([0x80, protocol]) if protocol > 1 else b""
    if protocol == 4:
        parts = [module.encode(), name.encode()]
        function = b"".join(b"\x8c" + bytes([len(part)]) + part for part in parts) + b"\x93"
    else:
        function = f"c{module}\n{name}\n".encode()
    packed = pickle.dumps(arguments, protocol if protocol != 4 else 3)
    packed = packed[2:-1] if protocol > 1 else packed[:-1]
    result = function + packed + b"R"
    if form == "value":
        result = b"}" + b"X\x01\x00\x00\x00w" + result + b"s"
    elif form == "nested":
        result = b"}" + b"X\x01\x00\x00\x00w" + b"]" + result + b"a" + b"s"
    elif form == "build":
        result += b"}X\x01\x00\x00\x00aX\x01\x00\x00\x00bsb"
    return head + result + b"."


def _in_zip(data: bytes, deflated: bool) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return buffer.getvalue()


@cache
def bomb(power: int) -> bytes:
    """A zip whose data.pkl has 2^power bytes when it is unpacked."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("archive/data.pkl", "w", force_zip64=True) as out:
            for _ in range(1 << (power - 22)):
                out.write(bytes(1 << 22))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def deep(depth: int) -> bytes:
    """Lists in lists."""
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


@cache
def good_file(kind: str) -> bytes:
    """A sound file: of weights in either format of torch, or of a training state."""
    buffer = io.BytesIO()
    if kind == "state":
        torch.save(
            {"step": 1, "parameters": {"a": torch.ones(3)}, "optimizer": {"state": {}, "param_groups": []}}, buffer
        )
    else:
        torch.save(material.weights(), buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


def _rezip(random: Random, data: bytes) -> bytes:
    """The same entries, one of them changed, doubled, renamed or compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        chosen = random.choice([name for name in names if name.endswith("data.pkl")] * 5 + names[:20])
        for name in names:
            content, kind = old.read(name), random.randrange(4) if name == chosen else -1
            if kind == 0:
                content = values.change_bytes(random, content)
            if kind == 1:
                new.writestr(random.choice(("../../canary", "/canary", "archive/other")), content)
            new.writestr(name, content, zipfile.ZIP_DEFLATED if kind == 2 else zipfile.ZIP_STORED)
            if kind == 3 and len(content) < 100_000:
                new.writestr(f"{name}2", content)
    return buffer.getvalue()


def _saved(random: Random) -> bytes:
    """What torch.save writes of odd values, such as tensors that share or repeat their memory."""
    some: Any = random.choice(
        (
            lambda: torch.ones(1).expand(1 << 40),
            lambda: torch.ones(3, 4).to_sparse(),
            lambda: torch.nn.Parameter(torch.ones(3)),
            lambda: torch.ones(3, dtype=torch.complex64),
            lambda: torch.nn.Linear(2, 2),
            lambda: {"nested": {"a": torch.ones(2)}},
            lambda: [torch.ones(2)],
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            lambda: torch.empty(3, device="meta"),
            lambda: float("nan"),
        )
    )()
    buffer = io.BytesIO()
    name = random.choice(sorted(material.weights()))
    whole = (
        {**material.weights(), name: some}
        if random.random() < 0.6
        else random.choice((some, {5: some}, {"step": some}))
    )
    torch.save(whole, buffer)
    return buffer.getvalue()


def check(case: tuple[str, bytes], place: Path) -> None:
    target, data = case
    folder = material.copy(place / "model", "model.safetensors")
    file = material.put(folder / ("state.pt" if target == "state" else "pytorch_model.bin"), data)
    try:
        _read(target, folder, file, data)
    finally:
        left = [*Path("/").glob("canary*"), *place.rglob("canary*")]
        expect(not left, f"code of the file has run: {left}")


def _read(target: str, folder: Path, file: Path, data: bytes) -> None:
    if target == "state":
        state = load_state(folder)
        expect(type(state.step) is int and state.step >= 0, f"step {state.step!r}")
        expect(all(isinstance(value, torch.Tensor) for value in state.parameters.values()), "parameters are tensors")
    elif target == "load":
        f = florence2.load(folder, device="cpu", allow_pickle=True)
        expect(all(torch.isfinite(tensor).all() for tensor in f.model.state_dict().values()), "weights are finite")
    elif target == "describe":
        expect(describe_checkpoint(folder, allow_pickle=True), "a description")
    else:
        files = WeightFiles((file,), pickled=True)
        headers = files.read_headers()
        tensors = files.read() if target == "headers" else zip(headers, files.read_named(headers), strict=True)
        for name, tensor in tensors:
            expect(tuple(tensor.shape) == headers[name].shape, f"{name} has the shape {tensor.shape}")
            float(tensor.flatten()[-1]) if tensor.numel() else None
