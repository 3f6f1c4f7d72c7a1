"""Read an image in any form, turn it upright, and compute `pixel_values`.

Pillow resizes it in 8 bits. Each of the 256 possible values then has one result per channel, computed as the reference
computes a pixel, so the array equals the reference's bit for bit.
"""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from florence2.errors import ImageError

MAX_PIXELS = 178_956_970  # 512 MiB as RGB; Pillow refuses to decode larger images as well
MAX_SIDE = 8192  # pixels of the model's input
MAX_STREAM_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20
_EXIF_ORIENTATION = 0x0112


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


def open_image(source: ImageInput) -> Image.Image:
    """Read an image in any form.

    EXIF orientation is applied, alpha is dropped, 16-bit values are scaled to 8 bits. Of an animation the first frame
    is read.

    Args:
        source: One of

            - a path, or the bytes of an image file;
            - a file object opened in binary mode, which is read from its position to its end, at most 256 MiB;
            - a Pillow image;
            - an array or a torch tensor on the CPU of shape (H, W), (H, W, 1), (H, W, 3), (H, W, 4) or (3, H, W), with
              uint8 values in RGB(A) order or uint16 values in 0..65535. A shape is read as (3, H, W) only if it begins
              with 3 and does not end with 1, 3 or 4; (3, 20, 3) is an image 3 pixels high.

    Returns:
        The upright image in mode RGB.

    Raises:
        ImageError: The source is not an image, is truncated, or has more than `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "The image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _read_file(io.BytesIO(bytes(source)), "The data")
    if isinstance(source, str | os.PathLike):
        return _read_file(_regular_file(Path(source)), os.fspath(source))
    if hasattr(source, "__array__"):
        return _to_rgb(_from_array(_to_array(source)), "The array")
    if hasattr(source, "read"):
        return _read_file(_read_stream(source), "The file object's data")
    raise ImageError(
        f"An image must be a path, bytes, a file object, a Pillow image or an array, not {type(source).__name__}."
    )


def image_to_array(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """Return the float32 `pixel_values` (1, 3, config.height, config.width) of an RGB image of any size.

    As in the reference, the aspect ratio is not kept. Values are (v * rescale_factor - mean) / std per channel.
    """
    resized = image.resize((config.width, config.height), Image.Resampling(config.resample))
    values = np.asarray(resized)  # (H, W, 3) uint8
    table = _normalised_values(config)  # (3, 256)
    pixel_values = np.empty((1, 3, config.height, config.width), np.float32)
    for channel in range(3):
        np.take(table[channel], values[:, :, channel], out=pixel_values[0, channel])
    return pixel_values


def image_suffixes() -> frozenset[str]:
    """Return the file name suffixes of the formats that Pillow reads here, lower-case and with the dot."""
    Image.init()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def _normalised_values(config: ImageConfig) -> np.ndarray:
    """Return the result for each 8-bit value per channel, (3, 256)."""
    # The reference rescales in double and normalises in single precision.
    scaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    return (scaled[None] - mean[:, None]) / std[:, None]


def _regular_file(path: Path) -> Path:
    """Return `path`, but refuse a pipe, socket or device, which could block without end when opened."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return path  # opening it raises the error to report
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ImageError(f"{path} is not a regular file. Give the bytes of a pipe, or - on the command line for stdin.")
    return path


def _read_stream(stream: BinaryReader) -> io.BytesIO:
    """Read a file object from its position to its end."""
    buffer = io.BytesIO()
    try:
        while chunk := stream.read(_CHUNK_BYTES):
            buffer.write(chunk)
            if buffer.tell() > MAX_STREAM_BYTES:
                raise ImageError(f"The file object has more than {MAX_STREAM_BYTES >> 20} MiB, too much for an image.")
    except ImageError:
        raise
    except TypeError:
        raise ImageError("The file object does not return bytes; open the file in binary mode.") from None
    except Exception as error:  # noqa: BLE001  closed files, lost connections: any class of the caller's
        raise ImageError(f"The file object cannot be read: {error or type(error).__name__}.") from None
    if buffer.tell() == 0:
        raise ImageError("The file object is empty or at its end; seek(0) goes back to its start.")
    buffer.seek(0)
    return buffer


def _to_array(source: Any) -> np.ndarray:
    try:
        return np.asarray(source)
    except Exception as error:  # noqa: BLE001  a tensor on a GPU, with gradients, or of a type that NumPy lacks
        reason = str(error).split("\n")[0]
        raise ImageError(f"A {type(source).__name__} cannot be read as an array: {reason}") from None


def _read_file(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return _to_rgb(image, name)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check the path.") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder, not an image.") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image in a format that Pillow {PIL.__version__} reads.") from None
    except Image.DecompressionBombError:
        raise ImageError(_too_large(name)) from None
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001  on hostile files Pillow's decoders raise many classes of errors
        raise ImageError(f"{name} cannot be read: {error or type(error).__name__}.") from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width < 1 or image.height < 1:
        raise ImageError(f"{name} is empty: {image.width} x {image.height} pixels.")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{_too_large(name)} It has {image.width} x {image.height}.")
    try:
        image.load()
    except (OSError, ValueError) as error:  # a truncated file; a closed image
        raise ImageError(f"{name} cannot be read: {error}.") from None
    upright = _apply_orientation(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;"):
        upright = _from_deep_grey(upright, name)
    try:
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except ValueError:
        raise ImageError(f"{name} has the colour mode {upright.mode}, which Pillow cannot convert to RGB.") from None


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  real EXIF blocks are broken in many ways; then the image is used as stored
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _from_deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Convert one channel of 16 or 32 bits to mode L. Integers span 0..65535."""
    # Pillow's own conversion would clip at 255.
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name} holds {values.dtype} values from {values.min()} to {values.max()}, so its range is unknown; "
            "scale it to 8 bits first."
        )
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def _from_array(values: np.ndarray) -> Image.Image:
    given = values.shape
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        values = (values >> 8).astype(np.uint8)
    if values.ndim == 3 and values.shape[0] == 3 and values.shape[2] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)  # (3, H, W) -> (H, W, 3)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.dtype != np.uint8 or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))):
        raise ImageError(
            f"An array must have the shape (H, W), (H, W, 3), (H, W, 4) or (3, H, W) and the type uint8 or uint16, not "
            f"{given} {values.dtype}; scale floats to 0..255."
        )
    return Image.fromarray(np.ascontiguousarray(values))


def _too_large(name: str) -> str:
    return f"{name} has more than the {MAX_PIXELS:,} pixels allowed; make it smaller first."
