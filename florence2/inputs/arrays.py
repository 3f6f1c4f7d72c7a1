"""Read arrays as images, deep grey as 8 bits and transparency as a colour: block by block, without large copies."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from florence2.errors import ImageError

MAX_PIXELS = 178_956_970  # 512 MiB as RGB; Pillow refuses to decode larger images as well
MAX_COPIED_PIXELS = 120_000_000  # of images that are converted or turned, for which memory must hold two of four bytes
_BLOCK_PIXELS = 1 << 20
_DEEPEST = 65535
_DIMMEST = 4096  # values of 12 bits and fewer, which would be almost black
_LIGHT = ("1", "L", "P", "RGB", "I;16", "I;16L", "I;16B", "I;16N", "I")
"""Modes that become RGB without a second copy of four bytes a pixel."""


def check_size(width: int, height: int, name: str, mode: str = "RGB", turned: bool = False) -> None:
    """Raise ImageError for an image that is empty or larger than the limit."""
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty: {width} x {height} pixels.")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{too_large(name)} It has {width} x {height}.")
    if width * height > MAX_COPIED_PIXELS and (turned or mode not in _LIGHT):
        raise ImageError(
            f"{name} has {width} x {height} pixels in mode {mode}. More than {MAX_COPIED_PIXELS:,} are read only as "
            "upright RGB or grey; convert it or make it smaller first."
        )


def too_large(name: str) -> str:
    """Return the sentence about an image of too many pixels."""
    return f"{name} has more than the {MAX_PIXELS:,} pixels allowed; make it smaller first."


def from_array(source: Any, name: str) -> Image.Image:
    """Read an array or tensor as an image of mode L, RGB or RGBA. Raises ImageError; see `open_image` for the rules."""
    values = _channels_last(_to_array(source))
    height, width = values.shape[:2]
    mode = "L" if values.ndim == 2 else {3: "RGB", 4: "RGBA"}[values.shape[2]]
    check_size(width, height, name, mode)
    convert = _converter(values, name)
    image = Image.new(mode, (width, height))
    for top, bottom in _blocks(width, height):
        image.paste(Image.fromarray(np.ascontiguousarray(convert(values[top:bottom]))), (0, top))
    return image


def from_deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Convert one channel of 16 or 32 bits to mode L. Integers span 0..65535."""
    # Pillow's own conversion would clip at 255.
    bands = [(0, top, image.width, bottom) for top, bottom in _blocks(*image.size)]
    extremes = [(values.min(), values.max()) for values in (np.asarray(image.crop(band)) for band in bands)]
    lowest, highest = min(low for low, _ in extremes), max(high for _, high in extremes)
    if lowest.dtype.kind == "f" or not 0 <= lowest <= highest <= _DEEPEST:
        raise ImageError(
            f"{name} holds {lowest.dtype} values from {lowest} to {highest}, so its range is unknown; scale it to 8 "
            "bits first."
        )
    _check_depth(int(highest), name)
    grey = Image.new("L", image.size)
    for band in bands:
        grey.paste(Image.fromarray((np.asarray(image.crop(band)) >> 8).astype(np.uint8)), band[:2])
    return grey


def check_deep_colour(image: Image.Image, name: str) -> None:
    """Raise ImageError for an image of 16 bits a channel, which Pillow reads as 8, that became almost black."""
    bands = image.getextrema()[: 1 if image.mode == "LA" else 3]
    highest = max(int(band[1]) for band in bands if isinstance(band, tuple))
    if highest < _DIMMEST >> 8:
        raise ImageError(_too_dim(name, f"less than {(highest + 1) << 8:,}"))


def on_background(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Return an image with transparency as RGB on a colour."""
    result = Image.new("RGB", image.size)
    for top, bottom in _blocks(*image.size):
        part = image.crop((0, top, image.width, bottom)).convert("RGBA")
        result.paste(Image.alpha_composite(Image.new("RGBA", part.size, (*colour, 255)), part).convert("RGB"), (0, top))
    return result


def _to_array(source: Any) -> np.ndarray:
    try:
        return np.asarray(source)
    except Exception as error:  # noqa: BLE001  a tensor on a GPU, with gradients, or of a type that NumPy lacks
        reason = str(error).split("\n")[0]
        raise ImageError(
            f"A {type(source).__name__} cannot be read as an array: {reason.rstrip('.')}. Give a tensor on the CPU, "
            "without gradients, in uint8 or float32."
        ) from None


def _channels_last(values: np.ndarray) -> np.ndarray:
    """Return a view (H, W), (H, W, 3) or (H, W, 4) of the values. Raises ImageError for any other shape."""
    shape = values.shape
    if values.ndim == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4)):
        return values
    batch = " Of a batch, give one image at a time." if values.ndim == 4 else ""
    raise ImageError(
        f"An array must have the shape (H, W), (H, W, 3), (H, W, 4), (1, H, W) or (3, H, W), not {shape}.{batch}"
    )


def _converter(values: np.ndarray, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that turns a block of the values into uint8. Raises ImageError for values out of range."""
    if values.dtype == np.uint8:
        return lambda block: block
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        _check_depth(int(values.max()), name)
        return lambda block: (block >> 8).astype(np.uint8)
    if values.dtype.kind != "f":
        raise ImageError(
            f"An array must have the type uint8, uint16 or a float in 0..1, not {values.dtype}; for values in 0..255 "
            "convert it to uint8."
        )
    lowest, highest = values.min(), values.max()
    if not 0 <= lowest <= highest <= 1:  # false for NaN as well
        raise ImageError(
            f"{name} holds {values.dtype} values from {lowest:g} to {highest:g}, but floats must be in 0..1. Divide "
            "values in 0..255 by 255, undo a normalisation by mean and std, or clip what a filter overshot."
        )
    return lambda block: np.rint(block.astype(np.float32) * 255).astype(np.uint8)


def _check_depth(highest: int, name: str) -> None:
    """Raise ImageError where 16-bit values are likely of fewer bits; an image of zeros is black in any depth."""
    if 0 < highest < _DIMMEST:
        raise ImageError(_too_dim(name, f"at most {highest:,}"))


def _too_dim(name: str, reach: str) -> str:
    return (
        f"{name} has 16-bit values of {reach}, so it would be almost black: 16 bits reach {_DEEPEST:,}. If the values "
        "are of fewer bits, scale them to 0..255 and give 8 bits (uint8)."
    )


def _blocks(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last row, exclusive, of blocks of about a million pixels."""
    rows = max(1, _BLOCK_PIXELS // width)
    return ((top, min(top + rows, height)) for top in range(0, height, rows))
