"""The image formats that are opened, and names for files in other formats.

Pillow knows many more formats. Some of their decoders start programs (EPS starts Ghostscript), others are rarely used
and rarely tested. Files in those are recognised by their first bytes alone, and refused by name.
"""

import contextlib
from pathlib import Path
from typing import IO

from PIL import Image, ImageFile

from florence2.errors import ImageError
from florence2.inputs.checks.tiff import CR2_MARK, explain_tiff, raw_refusal
from florence2.inputs.files import LFS_POINTER, lfs_problem

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".mpo",),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "ICO": (".ico",),
    "QOI": (".qoi",),
}
"""The formats that are opened, by Pillow's names, with the suffixes of their files."""
_HEIF = (".heic", ".heif", ".hif")
_OTHER_SUFFIXES = frozenset(
    """
    .arw .bw .cr2 .cr3 .cur .dcx .dds .dib .dng .emf .eps .fits .fli .heic .heif .hif .icns .im .jxl .nef .orf .pcd
    .pcx .pdf .ps .psd .raf .ras .raw .rgb .rw2 .sgi .svg .svgz .tga .wmf .xbm .xcf .xpm
    """.split()
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_REMEDIES = {
    "HEIC": "Pillow cannot read. Convert it to JPEG, or in Python install pillow-heif and call "
    "pillow_heif.register_heif_opener() first.",
    "HTML": "is a web page and not an image; open the page and download the image itself.",
    "MP4": "is a video and not an image; save one of its frames as PNG or JPEG first.",
    "gzip": "is a compressed file; unpack it first.",
    "ZIP": "is an archive; unpack it first.",
}
_HEAD_BYTES = 1024
_HTML_TAGS = (b"html", b"!doctype html", b"head", b"body", b"title", b"meta", b"script", b"div", b"p>")
_WEAK_CHECKS = ("CUR", "GBR")  # Pillow's checks of these accept other formats too, such as TGA and GRIB
_RAW_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (  # where, which bytes, name; most begin like a TIFF or an MP4
    (8, CR2_MARK, "CR2"),
    (4, b"ftypcrx ", "CR3"),
    (0, b"IIRO", "ORF"),
    (0, b"IIRS", "ORF"),
    (0, b"MMOR", "ORF"),
    (0, b"IIU\0", "RW2"),
    (0, b"FUJIFILMCCD-RAW", "RAF"),
    (0, b"FOVb", "X3F"),
    (0, b"\0MRM", "MRW"),
)
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (  # in the same form
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF"),
    (0, b"\x01\x00\x09\x00", "WMF"),
    (40, b" EMF", "EMF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"gimp xcf", "XCF"),
    (4, b"ftyp", "MP4"),  # after HEIF and AVIF, which begin so too
)


def image_suffixes() -> frozenset[str]:
    """Return the file name suffixes of the formats that are opened, lower-case and with the dot."""
    heif = _HEIF if "HEIF" in _opened() else ()
    return frozenset((*heif, *(suffix for suffixes in FORMATS.values() for suffix in suffixes)))


def other_image_suffixes() -> frozenset[str]:
    """Return the file name suffixes of image formats that are not opened, such as ".heic", in the same form."""
    return _OTHER_SUFFIXES - image_suffixes()


def open_lazily(file: Path | IO[bytes]) -> ImageFile.ImageFile:
    """Open an image file in one of `FORMATS` without decoding it. Raises as `PIL.Image.open`."""
    return Image.open(file, formats=_opened())


def check_format(image: Image.Image, name: str) -> None:
    """Raise ImageError for an image that Pillow opened with a decoder of its own that is not in `FORMATS`.

    Pixels may not be decoded yet. A decoder of another package is one that the user has chosen.
    """
    own = isinstance(image, ImageFile.ImageFile) and type(image).__module__.startswith("PIL.")
    if own and image.format not in FORMATS:
        raise ImageError(_refusal(name, str(image.format)))


def explain_unidentified(file: Path | IO[bytes], name: str) -> ImageError:
    """Return the error for a file that `open_lazily` did not identify, with the name of its format if it is known."""
    if not isinstance(file, Path):
        return _explain(file, name)
    with file.open("rb") as stream:
        return _explain(stream, name)


def _explain(stream: IO[bytes], name: str) -> ImageError:
    stream.seek(0)
    head = stream.read(_HEAD_BYTES)
    if not head:
        return ImageError(f"{name} is empty.")
    if head.startswith(LFS_POINTER):
        return ImageError(lfs_problem(name))
    if raw := _by_signature(head, _RAW_SIGNATURES):
        return ImageError(raw_refusal(name, raw))
    known = _name_format(head)
    if known is None:
        return ImageError(f"{name} is not an image in a format that is opened here: {', '.join(FORMATS)}.")
    if known == "TIFF":
        return explain_tiff(stream, name)
    if known in FORMATS:
        return ImageError(f"{name} cannot be read: it begins as {known}, but is damaged.")
    return ImageError(_refusal(name, known))


def _opened() -> list[str]:
    """Return the formats that this Pillow opens; HEIF is among them once pillow-heif is registered."""
    Image.init()
    return [name for name in (*FORMATS, "HEIF") if name in Image.OPEN]  # MPO is opened as JPEG


def _refusal(name: str, known: str) -> str:
    remedy = _REMEDIES.get(known, "is not opened here; convert it to PNG or JPEG first.")
    return f"{name} is in the format {known}, which {remedy}"


def _name_format(head: bytes) -> str | None:
    """Return the name of a file's format by its first bytes, without starting a decoder."""
    text = head.replace(b"\0", b"").lstrip(b"\xff\xfe\xef\xbb\xbf \t\r\n").lower()  # also of UTF-16, with its mark
    if text.startswith(b"<"):
        drawing, *page = (text.find(b"<" + tag) for tag in (b"svg", *_HTML_TAGS))
        first = min((place for place in page if place >= 0), default=len(text))
        return "SVG" if 0 <= drawing < first else "HTML" if first < len(text) else None
    # the brand, then the compatible ones: AVIF may begin with mif1 too
    if head[4:8] == b"ftyp" and b"avif" not in head[:64] and any(brand in head[8:64] for brand in _HEIF_BRANDS):
        return "HEIC"
    return _by_pillow(head, opened=True) or _by_signature(head, _SIGNATURES) or _by_pillow(head, opened=False)


def _by_signature(head: bytes, signatures: tuple[tuple[int, bytes, str], ...]) -> str | None:
    return next((name for at, bytes_, name in signatures if head.startswith(bytes_, at)), None)


def _by_pillow(head: bytes, opened: bool) -> str | None:
    """Return the Pillow format whose check of the first 16 bytes accepts `head`."""
    Image.init()
    for name, (_, accept) in Image.OPEN.items():
        if accept is not None and (name in FORMATS) is opened and name not in _WEAK_CHECKS:
            with contextlib.suppress(Exception):  # some checks expect 16 bytes
                if accept(head[:16]) is True:
                    return name
    return None
