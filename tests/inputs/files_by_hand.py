"""Write PNG and TIFF files whose samples have any form, which Pillow cannot."""

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}
_SIZES = {1: "B", 2: "c", 3: "H", 4: "I"}


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of whole numbers of any depth, the highest bit first."""
    rows = ("".join(format(int(value), f"0{bits}b") for value in row) for row in values)
    return b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)


def png(values: np.ndarray, bits: int, colours: int, transparent: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG of values (H, W * S); `colours` is the colour type, `transparent` the content of tRNS."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", values.shape[1] // _CHANNELS[colours], len(values), bits, colours, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"PLTE", palette) if palette else b""
    data += chunk(b"tRNS", transparent) if transparent else b""
    rows = b"".join(b"\0" + packed(row[None], bits) for row in values)
    return data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(
    values: np.ndarray,
    bits: int,
    photometric: int,
    *,
    type: int = 1,
    order: str = "<",
    planar: bool = False,
    deflate: bool = False,
    extra: Sequence[int] = (),
    tags: Mapping[int, tuple[int, Sequence[int]] | None] = {},
) -> bytes:
    """A TIFF of values (H, W, S); `type` is SampleFormat, `tags` holds other tags, None for one to leave out."""
    height, width, samples = values.shape
    planes = list(values.transpose(2, 0, 1)) if planar else [values.reshape(height, width * samples)]
    whole = bits in (8, 16, 32, 64)
    strips = [
        plane.astype(f"{order}{_KINDS[type]}{bits // 8}").tobytes() if whole else packed(plane, bits)
        for plane in planes
    ]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    starts = [8 + sum(len(strip) for strip in strips[:i]) for i in range(len(strips))]
    entries: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * samples),
        259: (3, [8 if deflate else 1]),
        262: (3, [photometric]),
        273: (4, starts),
        277: (3, [samples]),
        278: (4, [height]),
        279: (4, [len(strip) for strip in strips]),
        284: (3, [2 if planar else 1]),
        339: (3, [type] * samples),
    }
    entries |= {338: (3, extra)} if extra else {}
    body = b"".join(strips)
    chosen = {tag: entry for tag, entry in {**entries, **tags}.items() if entry is not None}
    return _head(order, 8 + len(body)) + body + _directory(chosen, order, 8 + len(body))


def _head(order: str, place: int) -> bytes:
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", place)


def _directory(entries: Mapping[int, tuple[int, Sequence[int]]], order: str, place: int) -> bytes:
    table, rest = struct.pack(f"{order}H", len(entries)), b""
    start = place + 2 + 12 * len(entries) + 4
    for tag, (type, values) in sorted(entries.items()):
        data = struct.pack(f"{order}{len(values)}{_SIZES[type]}", *values)
        if len(data) > 4:
            rest, data = rest + data, struct.pack(f"{order}I", start + len(rest))
        table += struct.pack(f"{order}HHI", tag, type, len(values)) + data.ljust(4, b"\0")
    return table + bytes(4) + rest
