"""Images in every form: files of every format, spoilt; arrays, tensors, paths, file objects, lazy Pillow images."""

import base64
import io
import os
import struct
import zlib
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from florence2.inputs.image import image_to_array, open_image
from tests.fuzz import material, values
from tests.fuzz.worker import expect

_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "ICO": ("RGBA",),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}
_MOST_PIXELS = 178_956_970
_OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
_FOREIGN = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(anything) run\n%%EOF\n",
    "eps2": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<II", 30, 90)
    + bytes(18)
    + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "wmf": b"\xd7\xcd\xc6\x9a\x00\x00\x00\x00\x00\x00\x64\x00\x64\x00\x60\x00"
    + bytes(6)
    + b"\x01\x00\x09\x00"
    + bytes(40),
    "emf": b"\x01\x00\x00\x00" + bytes(36) + b" EMF" + bytes(60),
    "heic": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(80),
    "fits": b"SIMPLE  =                    T".ljust(80)
    + b"BITPIX  =                    8".ljust(80)
    + b"END".ljust(2720),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "grib": b"GRIB\x00\x00\x00\x01" + bytes(60),
    "bufr": b"BUFR\x00\x00\x00\x01" + bytes(60),
    "pdf": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:9/"/></svg>',
    "sgi": b"\x01\xda\x00\x01\x00\x02\x00\x08\x00\x08\x00\x01" + bytes(600),
    "psd": b"8BPS\x00\x01" + bytes(6) + b"\x00\x03\x00\x00\x00\x08\x00\x00\x00\x08\x00\x08\x00\x03" + bytes(200),
    "pcx": b"\x0a\x05\x01\x08" + bytes(124) + bytes(64),
    "msp": b"DanM" + bytes(60),
    "xbm": b"#define im_width 8\n#define im_height 8\nstatic char im_bits[] = {\n0x00,0,0,0,0,0,0,0 };",
}


def draw(random: Random) -> tuple[str, Any]:
    """(form, what it is made from)."""
    form = random.choice(
        (
            *("file", "file", "file", "spoilt", "spoilt", "spoilt", "spoilt", "foreign", "array", "array", "array"),
            *("tensor", "place", "stream", "lazy", "url", "object"),
        )
    )
    if random.random() < 0.005:
        return "large", random.choice(("png16", "png8", "claim", "broadcast", "broadcast16"))
    if form == "foreign":
        name = random.choice(list(_FOREIGN))
        return form, (
            name,
            random.choice(("png", "jpg", name)),
            values.change_bytes(random, _FOREIGN[name]) if random.random() < 0.3 else _FOREIGN[name],
        )
    if form == "array":
        return form, _array(random)
    if form == "tensor":
        return form, (
            random.choice((3, 1, 4, 20)),
            random.choice(("uint8", "float32", "bfloat16", "int64", "grad", "meta", "sparse", "bool")),
        )
    if form == "place":
        return form, random.choice(
            ("absent", "folder", "pipe", "nul", "long", "zero", "loop", "empty", "surrogate", "text")
        )
    if form == "stream":
        return form, random.choice(("text", "none", "closed", "endless", "raises", "number", "end", "good", "slow"))
    if form == "object":
        return form, values.anything(random)
    name = random.choice([name for name in _MODES if name not in _OPTIONAL or features.check(_OPTIONAL[name])])
    made = (name, random.choice(_MODES[name]), random.randrange(1000), random.choice((None, None, 1, 3, 6, 8, 0, 99)))
    if form in ("spoilt", "lazy", "url"):
        data = encode(*made)
        return form, (name, data if form == "url" and random.random() < 0.5 else values.change_bytes(random, data, 200))
    return form, made


def _array(random: Random) -> tuple[tuple[int, ...], str, str, int]:
    """(shape, type, contents, seed)."""
    shape: tuple[int, ...] = random.choice(
        ((20, 30), (20, 30, 1), (20, 30, 3), (20, 30, 4), (3, 20, 30), (1, 20, 30), (4, 20, 30))
    )
    if random.random() < 0.3:
        shape = tuple(random.choice((0, 1, 2, 3, 4, 7)) for _ in range(random.randint(0, 5)))
    dtype = random.choice(
        ("uint8", "uint8", "uint16", ">u2", "float32", "float64", "float16", "int32", "int64", "bool")
    )
    dtype = (
        random.choice(("object", "complex64", "str", "datetime64[s]", "int8", "uint32"))
        if random.random() < 0.2
        else dtype
    )
    return shape, dtype, random.choice(("bytes", "wide", "unit", "nan", "reversed", "fortran")), random.randrange(1000)


@cache
def encode(name: str, mode: str, seed: int, orientation: int | None) -> bytes:
    """A small file of one format and mode, with an EXIF orientation."""
    noise = np.random.default_rng(seed).integers(0, 256, (13 + seed % 7, 17 + seed % 5, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode in ("I", "I;16", "F"):
        grey = np.asarray(image.convert("L"))
        image = Image.fromarray(
            grey.astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]) * (257 if seed % 2 else 1)
        )
    else:
        image = image.convert("RGB").convert("L").convert("LA") if mode == "LA" else image.convert(mode)
    options: dict[str, Any] = {"sizes": [(8, 8)]} if name == "ICO" else {}
    if orientation is not None and name in ("JPEG", "PNG", "TIFF", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def check(case: tuple[str, Any], place: Path) -> None:
    form, made = case
    source, wanted = globals()[f"_make_{form}"](made, place)
    try:
        read = open_image(source)
    finally:
        if form == "stream" and hasattr(source, "close"):
            source.close()
    expect(read.mode == "RGB" and min(read.size) >= 1, f"read as {read}")
    expect(read.width * read.height <= _MOST_PIXELS, f"{read.size} is above the limit")
    if wanted is not None:
        expect(np.array_equal(np.asarray(read), wanted), f"{np.asarray(read).ravel()[:6]} is not {wanted.ravel()[:6]}")
    config = material.model().processor.image_config
    pixels = image_to_array(read, config)
    expect(pixels.shape == (1, 3, material.SIDE, material.SIDE) and np.isfinite(pixels).all(), "pixel values")
    if form in ("array", "tensor"):
        _expect_contrast(np.asarray(source.detach() if isinstance(source, torch.Tensor) else source), read)


def _expect_contrast(values: np.ndarray, read: Image.Image) -> None:
    """What has contrast does not become one colour, such as black."""
    colours = values[..., :3] if values.ndim == 3 and values.shape[2] == 4 else values
    if colours.size > 20 and float(colours.max()) > float(colours.min()):
        extremes = np.array(read.getextrema())
        expect(
            (extremes[:, 0] < extremes[:, 1]).any(),
            f"{values.dtype} from {colours.min()} to {colours.max()}: one colour",
        )


# ---- each form: the source, and the pixels where they are certain --------------------------------------------------


def _make_file(made: Any, place: Path) -> tuple[Any, Any]:
    name, _, seed, orientation = made
    data = encode(*made)
    source = data if seed % 2 else material.put(place / f"image.{'jpg' if seed % 3 else name.lower()}", data)
    with Image.open(io.BytesIO(data)) as image:
        certain = image.mode in ("1", "L", "P", "RGB", "CMYK") and not orientation and "transparency" not in image.info
        return source, np.asarray(image.convert("RGB")) if certain else None


def _make_spoilt(made: Any, place: Path) -> tuple[Any, Any]:
    name, data = made
    return data if len(data) % 2 else material.put(place / f"image.{name.lower()}", data), None


def _make_lazy(made: Any, place: Path) -> tuple[Any, Any]:
    try:
        return Image.open(io.BytesIO(made[1]), formats=list(_MODES)), None
    except Exception:  # noqa: BLE001  Pillow has refused it itself
        return made[1], None


def _make_url(made: Any, place: Path) -> tuple[Any, Any]:
    kind = f"data:image/{made[0].lower()};base64,"
    return kind + base64.b64encode(made[1]).decode(), None


def _make_foreign(made: Any, place: Path) -> tuple[Any, Any]:
    _, ending, data = made
    return data if len(data) % 3 == 0 else material.put(place / f"holiday.{ending}", data), None


def _make_array(made: Any, place: Path) -> tuple[Any, Any]:
    shape, dtype, contents, seed = made
    rng = np.random.default_rng(seed)
    highest = {"bytes": 256, "wide": 65536}.get(contents, 256)
    array: Any = rng.integers(0, highest, shape)
    if contents in ("unit", "nan"):
        array = rng.random(shape)
    if contents == "nan" and array.size:
        array.flat[0] = np.nan
    with np.errstate(all="ignore"):
        array = array.astype(dtype)
    if contents == "reversed" and array.ndim:
        array = array[::-1]
    if contents == "fortran":
        array = np.asfortranarray(array)
    certain = dtype == "uint8" and array.ndim == 3 and array.shape[2] == 3 and array.size
    return array, array if certain else None


def _make_tensor(made: Any, place: Path) -> tuple[Any, Any]:
    first, kind = made
    shape = (first, 20, 30) if first != 20 else (20, 30, 3)
    if kind == "meta":
        return torch.empty(shape, device="meta"), None
    if kind == "sparse":
        return torch.rand(shape).to_sparse(), None
    if kind == "grad":
        return torch.rand(shape, requires_grad=True), None
    if kind in ("float32", "bfloat16"):
        return torch.rand(shape).to(getattr(torch, kind)), None
    return torch.randint(0, 2 if kind == "bool" else 256, shape).to(getattr(torch, kind)), None


def _make_place(made: str, place: Path) -> tuple[Any, Any]:
    path = place / "image.png"
    if made == "folder":
        path.mkdir()
    elif made == "pipe":
        os.mkfifo(path)
    elif made == "loop":
        path.symlink_to(path)
    elif made in ("empty", "text"):
        path.write_text("" if made == "empty" else "not an image" * 100, encoding="utf-8")
    others = {"nul": "a\0b.png", "long": "a" * 5000 + ".png", "zero": "/dev/zero", "surrogate": "a\udcff.png"}
    return others.get(made, str(path)), None


class _Stream:
    """A file object that misbehaves."""

    def __init__(self, kind: str):
        self.kind, self.data = kind, io.BytesIO(encode("PNG", "RGB", 1, None))

    def read(self, size: int = -1) -> Any:
        if self.kind == "raises":
            raise ConnectionError("lost")
        if self.kind == "slow":
            return self.data.read(min(size, 7))
        return {"none": None, "number": 5, "endless": bytes(max(size, 1))}[self.kind]


def _make_stream(made: str, place: Path) -> tuple[Any, Any]:
    data = encode("PNG", "RGB", 1, None)
    if made == "text":
        return io.StringIO("text"), None
    if made in ("closed", "end", "good"):
        stream = io.BytesIO(data if made == "good" else b"")
        if made == "closed":
            stream.close()
        return stream, None
    return _Stream(made), None


def _make_object(made: Any, place: Path) -> tuple[Any, Any]:
    return made, None


def _make_large(made: str, place: Path) -> tuple[Any, Any]:
    if made.startswith("broadcast"):
        return np.broadcast_to(np.array(7, np.uint16 if made.endswith("16") else np.uint8), (100_000, 100_000)), None
    return material.put(place / "large.png", large_png(made)), None


@cache
def large_png(kind: str) -> bytes:
    """A grey PNG of 13,300 x 13,300 pixels, in 8 or 16 bits, or one that only claims ten times that."""
    side, depth = (40_000, 8) if kind == "claim" else (13_300, 16 if kind == "png16" else 8)
    rows = 10 if kind == "claim" else side
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(bytes(1 + side * depth // 8)) for _ in range(rows)) + packer.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
