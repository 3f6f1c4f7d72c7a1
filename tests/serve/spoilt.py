"""Spoilt requests and images: values, bytes and heads changed at random, and files that claim to be huge."""

import socket
import struct
import zlib
from random import Random
from typing import Any

from PIL import Image

from tests.serve.server import encode

_NASTY: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e308,
    2**70,
    "",
    "\0",
    "<OD>",
    "x" * 5000,
    [],
    {},
    [[]],
    {"a": {}},
    "data:",
    "\ud83d\ude00",
)


def change(value: object, rng: Random) -> object:
    """Replace, add or remove something in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        way = rng.randrange(5)
        if way == 0:
            return {name: each for name, each in value.items() if name != key}
        if way == 1:
            extra = rng.choice(["n", "stream", "logprobs", "florence2", "tools", "image", "model", "response_format"])
            return {**value, extra: rng.choice(_NASTY)}
        return {**value, key: change(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], change(value[i], rng), *value[i + rng.randrange(2) :]]
    if isinstance(value, str) and len(value) > 20 and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return value[:i] + rng.choice(["", "\0", "é", "=", "<OD>", value[:10]]) + value[i + rng.randrange(3) :]
    return rng.choice(_NASTY)


def change_bytes(data: bytes, rng: Random, first: int | None = None) -> bytes:
    for _ in range(rng.randrange(1, 4)):
        i = rng.randrange(min(len(data), first or len(data)) or 1)
        data = data[:i] + rng.randbytes(rng.randrange(3)) + data[i + rng.randrange(3) :]
    return data


def head(path: str, data: bytes, rng: Random, spoil: bool) -> bytes:
    lines = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(data))}
    method = "POST"
    if spoil:
        name = rng.choice([*lines, "Origin", "Transfer-Encoding", "Expect", "X-Request-Timeout-Ms", "Sec-Fetch-Site"])
        lines[name] = rng.choice(
            ["", "-1", "0", "x", "chunked", "a" * 5000, "multipart/form-data", "application/JSON", "5"]
        )
        method = rng.choice(["POST", "GET", "PUT", "HEAD", "OPTIONS", "TRACE", "\xff"])
        path = rng.choice(
            [path, path + "/", "//", "/v1/models/" + "a" * 500, "/page/../app.py", "/%00", "*", "/v1/florence2?a=b"]
        )
    head = [
        f"{method} {path} HTTP/1.1",
        *(f"{name}: {value}" for name, value in lines.items()),
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(head).encode("latin-1")


def send(port: int, raw: bytes, seconds: float = 25) -> bytes:
    """Send bytes, end the sending side, and return what comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts)
        except ConnectionError:
            return b""


def bombs() -> dict[str, bytes]:
    """Small files of 20,000 x 20,000 pixels."""
    side = 20_000

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = zlib.compress(bytes(1 + side // 8) * side, 9)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    flat = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    ico = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(flat), 22) + flat
    found = {
        "PNG": flat,
        "ICO": ico,
        "PPM": b"P5 20000 20000 255\n",
        "BMP": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
    }
    found["GIF"] = (
        b"GIF89a"
        + struct.pack("<HHBBB", side, side, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, side, side, 0)
        + b"\x02\x02L\x01\x00;"
    )
    found["TIFF"] = _tiff(side)
    for name in ("WEBP", "AVIF"):  # the largest that the format can be, at a few bytes a pixel
        small = encode(Image.new("RGB", (64, 64)), name)
        found[name] = _larger(small, name, side)
    return found


def _tiff(side: int) -> bytes:
    tags = [
        (256, 4, side),
        (257, 4, side),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (278, 4, side),
        (279, 4, side),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def _larger(data: bytes, name: str, side: int) -> bytes:
    """Return a file whose header says another size."""
    if name == "AVIF":
        return data.replace(struct.pack(">II", 64, 64), struct.pack(">II", side, side))
    i = data.index(b"\x9d\x01\x2a") + 3 if b"\x9d\x01\x2a" in data else data.index(b"VP8L") + 9
    size = min(side, 16383)
    return data[:i] + struct.pack("<HH", size, size) + data[i + 4 :]
