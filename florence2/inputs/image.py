"""A picture in any form -> an upright RGB picture -> `pixel_values`.

The resize is Pillow's own, on 8-bit values, and the arithmetic after it is a table of the 256 possible results,
computed as the reference computes each pixel; so the tensor is equal to the reference's bit for bit.
"""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from florence2.errors import ImageError

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray"

MAX_PIXELS = 178_956_970  # 512 MiB as RGB: where Pillow too stops to believe that a file is a picture
MAX_SIDE = 8192  # of what the model sees
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes `pixel_values`, from `preprocessor_config.json`.

    `resample` is Pillow's filter number (3 is bicubic); `mean` and `std` are per RGB channel, for values in 0..1.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = 3


def open_image(source: ImageInput) -> Image.Image:
    """Read a picture and return it upright, in mode RGB.

    `source`: a path, the bytes of an image file, a Pillow image, or an array of shape (H, W), (H, W, 1), (H, W, 3)
    or (H, W, 4), uint8 in RGB(A) order, or uint16 in 0..65535. EXIF orientation is applied, alpha is dropped,
    16-bit values are scaled to 8 bits, of an animation the first frame is taken.
    Raises ImageError for what is no picture, truncated, or larger than MAX_PIXELS.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture")
    if isinstance(source, bytes | bytearray | memoryview):
        return _read_file(io.BytesIO(source), "the picture's bytes")
    if isinstance(source, str | os.PathLike):
        return _read_file(_regular_file(Path(source)), os.fspath(source))
    if hasattr(source, "__array__"):
        return _to_rgb(_from_array(_to_array(source)), "the array")
    raise ImageError(f"A picture must be a path, bytes, a Pillow image or an array, not {type(source).__name__}.")


def image_to_array(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """Return the float32 `pixel_values` (1, 3, config.height, config.width) of an RGB image of any size.

    Resized without keeping the aspect ratio, as in the reference; then (v * rescale_factor - mean) / std per channel.
    """
    resized = image.resize((config.width, config.height), Image.Resampling(config.resample))
    values = np.asarray(resized)  # (H, W, 3) uint8
    table = _normalised_values(config)  # (3, 256)
    pixel_values = np.empty((1, 3, config.height, config.width), np.float32)
    for channel in range(3):
        np.take(table[channel], values[:, :, channel], out=pixel_values[0, channel])
    return pixel_values


def _normalised_values(config: ImageConfig) -> np.ndarray:
    """The tensor value of each 8-bit value, per channel: (3, 256). Rescaled in double, normalised in single."""
    scaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    return (scaled[None] - mean[:, None]) / std[:, None]


def _regular_file(path: Path) -> Path:
    """`path`, unless opening it could wait for ever: a pipe, a socket, a device."""
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError):
        return path  # opening it will say what is wrong
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise ImageError(f"{path} is no regular file; a picture from a pipe is given as its bytes, or as - for stdin.")
    return path


def _to_array(source: Any) -> np.ndarray:
    try:
        return np.asarray(source)
    except Exception as error:  # noqa: BLE001  a tensor that needs gradients, or of a type that NumPy does not have
        reason = str(error).split("\n")[0]
        raise ImageError(f"A {type(source).__name__} cannot be read as an array: {reason}") from None


def _read_file(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return _to_rgb(image, name)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check the path.") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder, not a picture.") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no picture in a format that Pillow {PIL.__version__} reads.") from None
    except Image.DecompressionBombError:
        raise ImageError(_too_large(name)) from None
    except ImageError:
        raise
    # Pillow's decoders raise these, and on hostile files others too; none of them is our own mistake
    except Exception as error:  # noqa: BLE001
        raise ImageError(f"{name} cannot be read: {error or type(error).__name__}.") from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width < 1 or image.height < 1:
        raise ImageError(f"{name} is empty: {image.width} x {image.height} pixels.")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{_too_large(name)} It has {image.width} x {image.height}.")
    try:
        image.load()
    except (OSError, ValueError) as error:  # truncated; closed
        raise ImageError(f"{name} cannot be read: {error}.") from None
    upright = _apply_orientation(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;"):
        upright = _from_deep_grey(upright, name)
    try:
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except ValueError:
        raise ImageError(f"{name} has the colour mode {upright.mode}, which Pillow cannot turn into RGB.") from None


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    # EXIF blocks in the wild are broken in many ways; a picture without a readable orientation is taken as stored
    except Exception:  # noqa: BLE001
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _from_deep_grey(image: Image.Image, name: str) -> Image.Image:
    """One channel of 16 or 32 bits -> mode L. Integers span 0..65535; Pillow's own conversion would clip at 255."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name} holds {values.dtype} values from {values.min()} to {values.max()}, whose black and white are "
            "unknown; scale it to 8 bits first."
        )
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def _from_array(values: np.ndarray) -> Image.Image:
    if values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.dtype != np.uint8 or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))):
        raise ImageError(
            f"An array must have the shape (H, W), (H, W, 3) or (H, W, 4) and the type uint8 or uint16, not "
            f"{values.shape} {values.dtype}; scale floats to 0..255 and put channels last."
        )
    return Image.fromarray(np.ascontiguousarray(values))


def _too_large(name: str) -> str:
    return f"{name} has more than the {MAX_PIXELS:,} pixels allowed; make it smaller first."


def picture_suffixes() -> frozenset[str]:
    """Lower-case file name endings, with the dot, of the formats that Pillow reads here."""
    Image.init()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)
