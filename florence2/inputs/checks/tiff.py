"""TIFF files whose samples Pillow does not read, or reads wrongly without a sign: words for both.

A TIFF may hold samples of any depth and type, in one plane or several. Pillow reads some of these forms, and takes a
few of the rest for forms that it reads. A camera's raw file is often a TIFF too, whose first image is a thumbnail.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from PIL import Image, TiffImagePlugin

from florence2.errors import ImageError

_KIND, _WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
_STRIPS, _SAMPLES, _PLANES, _TILES, _SUB_IMAGES, _EXTRA, _FORMAT, _SUBSAMPLING = 273, 277, 284, 324, 330, 338, 339, 530
_DNG_VERSION = 50706
CR2_MARK = b"CR\x02"
"""The bytes at position 8 of a CR2."""
_WHITE_IS_0, _GREY, _RGB, _PALETTE, _CMYK, _YCBCR, _SENSOR, _LINEAR_RAW = 0, 1, 2, 3, 5, 6, 32803, 34892
_COLOURS: dict[int, tuple[str, int]] = {
    _WHITE_IS_0: ("grey, where 0 is white", 1),
    _GREY: ("grey", 1),
    _RGB: ("RGB", 3),
    _PALETTE: ("palette", 1),
    4: ("mask", 1),
    _CMYK: ("CMYK", 4),
    _YCBCR: ("YCbCr", 3),
    8: ("CIE L*a*b*", 3),
    9: ("ICC L*a*b*", 3),
    10: ("ITU L*a*b*", 3),
    32844: ("LogL", 1),
    32845: ("LogLuv", 3),
}
"""Names of the colour spaces, and how many samples a pixel has in each."""
_UNSIGNED, _SIGNED = 1, 2
_TYPES = {_UNSIGNED: "", _SIGNED: "signed ", 3: "float ", 4: "untyped ", 5: "complex ", 6: "complex "}
_UNCOMPRESSED = 1


@dataclass(frozen=True)
class SampleForm:
    """The form of a TIFF's samples, from its tags."""

    bits: int
    type: int
    photometric: int
    samples: int
    extra: tuple[int, ...]
    planar: bool
    compression: int
    fill_order: int
    subsampled: bool

    @classmethod
    def from_tags(cls, tags: Mapping[int, Any]) -> "SampleForm":
        """Return the form that the tags state, with TIFF's defaults."""
        bits = _numbers(tags, _BITS, (1,))
        return cls(
            bits=max(bits),
            type=max(_numbers(tags, _FORMAT, (_UNSIGNED,))),
            photometric=_numbers(tags, _PHOTOMETRIC, (_WHITE_IS_0,))[0],
            samples=_numbers(tags, _SAMPLES, (len(bits),))[0],
            extra=_numbers(tags, _EXTRA, ()),
            planar=_numbers(tags, _PLANES, (1,))[0] == 2,
            compression=_numbers(tags, _COMPRESSION, (_UNCOMPRESSED,))[0],
            fill_order=_numbers(tags, _FILL_ORDER, (1,))[0],
            subsampled=_numbers(tags, _SUBSAMPLING, ()) != (1, 1),  # 2, 2 where it is not stated
        )

    @property
    def is_misread(self) -> bool:
        """Return whether Pillow opens the form and gives wrong values, or values whose range is unknown."""
        # whole numbers of 32 bits are read by their range
        unknown = self.type != _UNSIGNED and (self.type, self.bits) != (_SIGNED, 32)
        inverted = self.photometric == _WHITE_IS_0 and self.bits > 8
        squeezed = self.photometric == _YCBCR and self.compression == _UNCOMPRESSED and self.subsampled
        return unknown or inverted or squeezed or self.bits not in (1, 2, 4, 8, 16, 32) or self._has_misread_planes

    @property
    def _has_misread_planes(self) -> bool:
        if not self.planar:
            return False
        if self.compression != _UNCOMPRESSED:
            return self.samples != self._colours[1] + len(self.extra)
        # of planes without compression Pillow knows those that have one letter each as modes, such as R, G, B
        plain = self.extra == () or (self.extra, self.photometric) == ((2,), _RGB)
        known = self.photometric in (_GREY, _RGB, _PALETTE, _CMYK) if self.bits == 8 else self.photometric == _GREY
        return self.bits not in (1, 8) or self.fill_order != 1 or not plain or not known

    @property
    def _colours(self) -> tuple[str, int]:
        return _COLOURS.get(self.photometric, (f"samples of photometric interpretation {self.photometric}", 1))

    def __str__(self) -> str:
        name, colours = self._colours
        further = self.samples - colours
        parts = [f"{self.bits}-bit {_TYPES.get(self.type, 'untyped ')}{name}"]
        if further > 0:
            parts.append(f"{further} further channel{'s' * (further > 1)}")
        if self.planar:
            parts.append("each channel in a plane of its own")
        if self.fill_order == 2:
            parts.append("the lowest bit first")
        if self.photometric == _YCBCR and self.subsampled:
            parts.append("subsampled colours")
        if self.compression not in TiffImagePlugin.COMPRESSION_INFO:
            parts.append(f"compression {self.compression}")
        return ", ".join(parts)


def check_tiff(image: Image.Image, name: str) -> None:
    """Raise ImageError for an opened TIFF that would be read wrongly. Pixels may not be decoded yet."""
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return
    if raw := _raw_format(tags) or _cr2(getattr(image, "fp", None)):
        raise ImageError(raw_refusal(name, raw))
    form = SampleForm.from_tags(tags)
    if form.is_misread:
        raise ImageError(_refusal(name, form))


def explain_tiff(file: IO[bytes], name: str) -> ImageError:
    """Return the error for a TIFF that Pillow did not identify: the form of its samples, or that it is damaged."""
    tags = _read_tags(file)
    if raw := _raw_format(tags):
        return ImageError(raw_refusal(name, raw))
    if _WIDTH in tags and _LENGTH in tags and (_STRIPS in tags or _TILES in tags):
        return ImageError(_refusal(name, SampleForm.from_tags(tags)))
    return ImageError(f"{name} cannot be read: it begins as TIFF, but is damaged.")


def raw_refusal(name: str, raw: str) -> str:
    """Return the sentence about a camera's raw file in the format `raw`."""
    return f"{name} is in the format {raw}, a camera's raw file, which is not opened here; export it as JPEG first."


def _refusal(name: str, form: SampleForm) -> str:
    return f"{name} is a TIFF of a form that is not read here: {form}. Convert it to PNG with 8 bits a channel first."


def _raw_format(tags: Mapping[int, Any]) -> str | None:
    """Return the name of a raw format, where a TIFF is a camera's raw file."""
    if _DNG_VERSION in tags:
        return "DNG"
    if _numbers(tags, _PHOTOMETRIC, (_GREY,))[0] in (_SENSOR, _LINEAR_RAW):
        return "TIFF with a sensor's values"
    # NEF, ARW and their kin begin with a thumbnail and hold the photo in a further image below it
    if _numbers(tags, _KIND, (0,))[0] & 1 and _SUB_IMAGES in tags:
        return "TIFF with a thumbnail before its photo"
    return None


def _cr2(file: IO[bytes] | None) -> str | None:
    """Return "CR2" for a file that has this mark, after a header and before tags like those of any TIFF."""
    if file is None or file.closed:  # the image is decoded already
        return None
    place = file.tell()
    file.seek(8)
    mark = file.read(len(CR2_MARK))
    file.seek(place)
    return "CR2" if mark == CR2_MARK else None


def _read_tags(file: IO[bytes]) -> Mapping[int, Any]:
    """Return the tags of the first image in a file, and none where they cannot be read."""
    try:
        file.seek(0)
        head = file.read(8)
        directory = TiffImagePlugin.ImageFileDirectory_v2(head + (file.read(8) if b"+" in head[2:4] else b""))
        file.seek(directory.next)
        directory.load(file)
    except Exception:  # noqa: BLE001  on hostile files Pillow's parser raises many classes of errors
        return {}
    return directory


def _numbers(tags: Mapping[int, Any], tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return the whole numbers of a tag; the default where it is missing or holds anything else."""
    try:
        value = tags.get(tag)
    except Exception:  # noqa: BLE001  values are decoded when they are first read
        return default
    values = value if isinstance(value, tuple) else (value,)
    return values if values and all(isinstance(item, int) for item in values) else default
