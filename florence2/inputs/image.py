"""Read an image in any form, turn it upright, and compute `pixel_values`.

Pillow resizes it in 8 bits. Each of the 256 possible values then has one result per channel, computed as the reference
computes a pixel, so the array equals the reference's bit for bit.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from florence2.errors import ImageError, OptionError, plain, shown
from florence2.inputs.arrays import (
    check_size,
    from_array,
    from_deep_grey,
    mend_transparency,
    on_background,
    too_large,
)
from florence2.inputs.checks.depth import DEEP_COLOUR, check_deep_colour
from florence2.inputs.checks.tiff import check_tiff
from florence2.inputs.files import check_regular, read_data_url, read_stream, short_name, url_problem
from florence2.inputs.formats import check_format, explain_unidentified, open_lazily
from florence2.inputs.formats import image_suffixes as image_suffixes

MAX_SIDE = 8192  # pixels of the model's input
_EXIF_ORIENTATION = 0x0112
_DEEP_GREY = ("I", "F")  # with all that begin so, such as I;16


class BinaryReader(Protocol):
    """A file object opened in binary mode."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, and no bytes at the end."""
        ...


class SupportsArray(Protocol):
    """An array of NumPy or another library, such as a torch tensor."""

    def __array__(self) -> np.ndarray: ...


ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | BinaryReader | Image.Image | SupportsArray"
"""An image in any form that `open_image` reads."""
Colour: TypeAlias = str | tuple[int, int, int]
"""A colour: a name such as "white", "#ffffff", or red, green and blue in 0..255."""


@dataclass(frozen=True)
class ImageConfig:
    """The image settings of a checkpoint, from `preprocessor_config.json`.

    `resample` is Pillow's filter number (3 is bicubic); `mean` and `std` are per RGB channel, for values in 0..1.
    `image_seq_length` is the number of image tokens that the file states; nothing is computed from it.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = 3
    image_seq_length: int | None = None


def open_image(source: ImageInput, background: Colour | None = None) -> Image.Image:
    """Read an image in any form.

    EXIF orientation is applied, 16-bit values are scaled to 8 bits. Of an animation the first frame is read. The
    formats are JPEG (and MPO), PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM, ICO and QOI.

    Args:
        source: One of

            - a path, the bytes of an image file, or a data URL with base64 of at most 256 MiB;
            - a file object opened in binary mode, which is read from its position to its end, at most 256 MiB;
            - a Pillow image of one of the formats, or made in memory;
            - an array or a torch tensor on the CPU of shape (H, W), (H, W, 1), (H, W, 3), (H, W, 4), (1, H, W) or
              (3, H, W), in RGB(A) order. Values are uint8, uint16 in 0..65535, or floats in 0..1. A shape is read as
              (3, H, W) only if it does not end with 1, 3 or 4; (3, 20, 3) is an image 3 pixels high.
        background: The colour that transparent pixels show: a name such as "white", "#ffffff", or (255, 255, 255).
            None drops alpha, as the reference does, and shows the colours that transparent pixels hide, often black.

    Returns:
        The upright image in mode RGB.

    Raises:
        ImageError: The source is not an image, is truncated, is in another format, has more than 178,956,970 pixels,
            or holds values whose range is unknown.
        OptionError: `background` is not a colour.
    """
    colour = None if background is None else parse_colour(background)
    try:
        return _to_rgb(*_open_upright(source), colour)
    except MemoryError:
        raise ImageError("The image needs more memory than is free; make it smaller first.") from None


def parse_colour(colour: Colour) -> tuple[int, int, int]:
    """Return the RGB values, 0..255, of a colour as `open_image` takes it. Raises OptionError for anything else."""
    try:
        red, green, blue = ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else map(plain, colour)
        if all(type(value) is int and 0 <= value <= 255 for value in (red, green, blue)):
            return red, green, blue
    except (TypeError, ValueError):
        pass
    raise OptionError(
        f"background is {shown(colour)}; it must be a colour, such as 'white', '#ffffff' or (255, 255, 255)."
    )


def image_to_array(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """Return the float32 `pixel_values` (1, 3, config.height, config.width) of an RGB image of any size.

    As in the reference, the aspect ratio is not kept. Values are (v * rescale_factor - mean) / std per channel.
    """
    return normalise([resize_image(image, config)], config)


def resize_image(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """Return the uint8 values (config.height, config.width, 3) of an RGB image of any size."""
    return np.asarray(image.resize((config.width, config.height), Image.Resampling(config.resample)))


def normalise(images: Sequence[np.ndarray], config: ImageConfig) -> np.ndarray:
    """Return the float32 `pixel_values` (B, 3, config.height, config.width) of images that `resize_image` returned."""
    table = normalised_values(config)
    pixel_values = np.empty((len(images), 3, config.height, config.width), np.float32)
    for image, result in zip(images, pixel_values, strict=True):
        for channel in range(3):
            # without the mode, which uint8 values do not need, NumPy writes to a buffer first
            np.take(table[channel], image[:, :, channel], out=result[channel], mode="clip")
    return pixel_values


def normalised_values(config: ImageConfig) -> np.ndarray:
    """Return the float32 result for each 8-bit value per channel, (3, 256)."""
    # The reference rescales in double and normalises in single precision.
    scaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    return (scaled[None] - mean[:, None]) / std[:, None]


def _open_upright(source: ImageInput) -> tuple[Image.Image, str]:
    """Return the upright image with 8 bits a channel, in any mode, and its name for messages."""
    if isinstance(source, Image.Image):
        return _load(source, "The image"), "The image"
    if isinstance(source, bytes | bytearray | memoryview):
        return _read_file(io.BytesIO(bytes(source)), "The data")
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        if path[:5].lower() == "data:":
            return _read_file(read_data_url(path), "The data URL's content")
        if problem := url_problem(path):
            raise ImageError(problem)
        return _read_file(check_regular(path), short_name(path))
    if hasattr(source, "__array__"):
        return from_array(source, "The array"), "The array"
    if is_file_object(source):
        return _read_file(read_stream(source), "The file object's data")
    raise ImageError(
        f"An image must be a path, bytes, a file object, a Pillow image or an array, not {type(source).__name__}."
    )


def is_file_object(source: ImageInput) -> TypeGuard[BinaryReader]:
    """Return whether an image is given as a file object, which is read from its position."""
    return hasattr(source, "read") and not (isinstance(source, Image.Image) or hasattr(source, "__array__"))


def _read_file(file: Path | io.BytesIO, name: str) -> tuple[Image.Image, str]:
    try:
        with open_lazily(file) as image:
            return _load(image, name), name
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check the path.") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder, not an image.") from None
    except UnidentifiedImageError:
        raise explain_unidentified(file, name) from None
    except Image.DecompressionBombError:
        raise ImageError(too_large(name)) from None
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  on hostile files Pillow's decoders raise many classes of errors
        raise ImageError(f"{name} cannot be read: {short_name(str(error)) or type(error).__name__}.") from None


def _load(image: Image.Image, name: str) -> Image.Image:
    """Decode an image and turn it upright; deep grey becomes mode L."""
    check_format(image, name)
    check_tiff(image, name)
    check_size(image.width, image.height, name, image.mode)
    tiles = [*getattr(image, "tile", ())]  # none once it is decoded
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a truncated file, a closed image: decoders raise many classes of errors
        raise ImageError(f"{name} cannot be read: {short_name(str(error)) or type(error).__name__}.") from None
    if image.mode in DEEP_COLOUR and any(map(_is_deep, tiles)):
        check_deep_colour(image, name)
    if image.format == "PNG" and tiles:
        image = mend_transparency(image, str(tiles[0][3]))
    if _is_turned(image):
        check_size(image.width, image.height, name, image.mode, turned=True)
        image = ImageOps.exif_transpose(image)
    return from_deep_grey(image, name) if image.mode.startswith(_DEEP_GREY) else image


def _is_deep(tile: Any) -> bool:
    """Return whether a part of a file has more than 8 bits a channel, by what Pillow's decoder is told."""
    decoder, _, _, arguments = tile
    if decoder in ("ppm", "ppm_plain"):
        return isinstance(arguments, tuple) and isinstance(arguments[-1], int) and arguments[-1] > 255
    return ";16" in str(arguments)


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9)
    except Exception:  # noqa: BLE001  real EXIF blocks are broken in many ways; then the image is used as stored
        return False


def _to_rgb(image: Image.Image, name: str, background: tuple[int, int, int] | None) -> Image.Image:
    try:
        if background is not None and image.has_transparency_data:
            return on_background(image, background, name)
        return image if image.mode == "RGB" else image.convert("RGB")
    except ImageError:
        raise
    except ValueError:
        raise ImageError(f"{name} has the colour mode {image.mode}, which Pillow cannot convert to RGB.") from None
