"""The formats that are opened; all others are refused by name, without starting a decoder."""

import io
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile, features

from florence2.errors import ImageError
from florence2.inputs import formats
from florence2.inputs.formats import FORMATS, image_suffixes, other_image_suffixes
from florence2.inputs.image import open_image
from florence2.train.images import upright_size
from parity.recipe import make_picture
from tests.inputs.test_image import saved

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(anything) run\n%%EOF\n"
WMF = struct.pack("<IHhhhhHIH", 0x9AC6CDD7, 0, 0, 0, 100, 100, 96, 0, 0) + b"\x01\x00\x09\x00" + bytes(40)
EMF = struct.pack("<IIiiiiiiii", 1, 108, 0, 0, 9, 9, 0, 0, 9, 9) + b" EMF" + bytes(80)
OTHERS = {
    "EPS": EPS,
    "PDF": b"%PDF-1.7\n",
    "PSD": b"8BPS\0\x01" + bytes(40),
    "WMF": WMF,
    "EMF": EMF,
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
    "HTML": b"\n<!DOCTYPE html><html>not found</html>",
    "JPEG XL": b"\xff\x0a" + bytes(20),
    "DDS": b"DDS " + bytes(140),
    "ICNS": b"icns" + bytes(40),
    "SGI": b"\x01\xda" + bytes(600),
    "PCX": b"\x0a\x05\x01\x08" + bytes(140),
    "GRIB": b"GRIB" + bytes(3) + b"\x01" + bytes(40),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(40),
    "FITS": b"SIMPLE" + b" " * 100,
    "MP4": b"\0\0\0\x18ftypisom" + bytes(40),
}


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that are started; a stand-in for Ghostscript is on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "gs").write_text("#!/bin/sh\necho 10.0\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    calls: list[Any] = []

    def start(*arguments: Any, **_: Any) -> None:
        calls.append(arguments)
        raise OSError("started")

    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    return calls


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused_by_name(name: str, tmp_path: Path, started: list[Any]) -> None:
    file = tmp_path / "holiday.png"  # the suffix does not matter
    file.write_bytes(OTHERS[name])
    for source in (file, OTHERS[name], io.BytesIO(OTHERS[name])):
        with pytest.raises(ImageError, match=f"is in the format {name}, which"):
            open_image(source)
    with pytest.raises(ImageError):
        upright_size(file)
    assert started == []


@pytest.mark.parametrize("name", ["EPS", "WMF", "EMF"])
def test_pillow_images_of_other_formats_are_refused_before_they_are_decoded(name: str, started: list[Any]) -> None:
    lazy = Image.open(io.BytesIO(OTHERS[name]))
    with pytest.raises(ImageError, match=f"The image is in the format {lazy.format}, which is not opened here"):
        open_image(lazy)
    assert started == []


@pytest.mark.parametrize("format", ["TGA", "PCX", "SGI", "DDS", "XBM"])
def test_files_that_pillow_writes_in_other_formats_are_refused(format: str) -> None:
    mode = "1" if format == "XBM" else "RGB"
    data = saved(make_picture(1, 8, 8, mode), format)
    with pytest.raises(ImageError, match=f"is in the format {format}|is not an image in a format that is opened here"):
        open_image(data)
    with pytest.raises(ImageError, match=f"is in the format {format}"):
        open_image(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (OTHERS["HTML"], "HTML, which is a web page and not an image; open the page and download the image itself"),
        (b"<head><title>404</title></head>", "HTML, which is a web page and not an image"),
        (b"<!-- cached --><p>Sign in first</p>", "HTML, which is a web page and not an image"),
        (b"<!DOCTYPE html><body><svg></svg></body>", "HTML, which is a web page and not an image"),
        ("\ufeff<html>".encode("utf-16-le"), "HTML, which is a web page and not an image"),
        (b"PK\x03\x04" + bytes(40), "ZIP, which is an archive; unpack it first"),
        (b"\x1f\x8b" + bytes(40), "gzip, which is a compressed file; unpack it first"),
        (OTHERS["MP4"], "MP4, which is a video and not an image; save one of its frames"),
    ],
)
def test_files_that_no_program_converts_to_png_get_another_remedy(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words) as raised:
        open_image(data)
    assert "convert it" not in str(raised.value)


def test_a_drawing_with_a_title_is_not_a_page() -> None:
    for data in (b"<!-- made by hand --><svg><title>x</title></svg>", b'<?xml version="1.0"?><svg><script/></svg>'):
        with pytest.raises(ImageError, match="is in the format SVG, which is not opened here; convert it to PNG"):
            open_image(data)
    with pytest.raises(ImageError, match="is not an image in a format that is opened here"):
        open_image(b"<data><row/></data>")


def test_heic_gets_the_hint_that_mends_it() -> None:
    for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        data = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + bytes(40)
        with pytest.raises(ImageError, match=r"HEIC.*Convert it to JPEG.*pillow-heif.*register_heif_opener"):
            open_image(data)


def test_the_brands_of_a_heic_end_after_64_bytes() -> None:
    """An AVIF among the compatible brands is not a HEIC, and later bytes are an image's."""
    for at, brand, is_heic in ((60, b"heic", True), (61, b"heic", False), (60, b"avif", False), (61, b"avif", True)):
        data = bytearray(b"\0\0\0\x18ftyp" + (b"isom" if brand == b"heic" else b"mif1") + bytes(80))
        data[at : at + 4] = brand
        assert (formats._name_format(bytes(data)) == "HEIC") == is_heic, (at, brand)


def test_heic_is_read_once_a_decoder_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (6, 4), "RGB"

        def load(self) -> None:
            self.im = Image.new("RGB", self.size, "red").im

    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    assert ".heic" in other_image_suffixes() - image_suffixes()
    Image.register_open("HEIF", Heif, lambda prefix: prefix[4:8] == b"ftyp")
    assert open_image(OTHERS["HEIC"]).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(Image.open(io.BytesIO(OTHERS["HEIC"]))).size == (6, 4)
    assert ".heic" in image_suffixes() - other_image_suffixes()


def test_every_listed_format_is_opened() -> None:
    image = make_picture(3, 32, 32)
    for format in FORMATS:
        if format == "AVIF" and not features.check("avif"):
            continue
        opened = open_image(saved(image, format))
        assert opened.size == (32, 32) and opened.mode == "RGB", format


def test_damaged_files_of_a_listed_format_are_called_so() -> None:
    with pytest.raises(ImageError, match="begins as PNG, but is damaged"):
        open_image(b"\x89PNG\r\n\x1a\n")


def test_suffixes() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".mpo", ".jp2"} <= image_suffixes()
    assert not image_suffixes() & {".txt", ".eps", ".ps", ".wmf", ".pdf", ".psd", ".svg", ".heic", ".tga"}
    assert {".eps", ".heic", ".psd", ".svg"} <= other_image_suffixes()
    assert not image_suffixes() & other_image_suffixes()
    registered = Image.registered_extensions()
    assert all(registered[suffix] in FORMATS for suffix in image_suffixes())
