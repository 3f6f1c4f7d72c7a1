"""Read arrays as images, deep grey as 8 bits and transparency as a colour: block by block, without large copies."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from florence2.errors import ImageError
from florence2.inputs.checks.depth import DEEPEST, check_depth

MAX_PIXELS = 178_956_970  # 512 MiB as RGB; Pillow refuses to decode larger images as well
MAX_COPIED_PIXELS = 120_000_000  # of images that are converted or turned, for which memory must hold two of four bytes
_BLOCK_PIXELS = 1 << 20
_SPREAD = {"L;2": 85, "L;4": 17}
"""Raw modes of a PNG whose values Pillow spreads over 0..255, with the factor."""
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
    """Convert one channel of 16 or 32 bits to mode L, or LA where one of its values is transparent.

    Integers span 0..65535.
    """
    # Pillow's own conversion would clip at 255.
    bands = [(0, top, image.width, bottom) for top, bottom in _blocks(*image.size)]
    extremes = [(values.min(), values.max()) for values in (np.asarray(image.crop(band)) for band in bands)]
    lowest, highest = min(low for low, _ in extremes), max(high for _, high in extremes)
    if lowest.dtype.kind == "f" or not 0 <= lowest <= highest <= DEEPEST:
        raise ImageError(
            f"{name} holds {lowest.dtype} values from {lowest} to {highest}, so its range is unknown; scale it to 8 "
            "bits first."
        )
    check_depth((np.asarray(image.crop(band)) for band in bands), name)
    clear = image.info.get("transparency")
    mode = "LA" if isinstance(clear, int) else "L"
    check_size(*image.size, name, mode)
    grey = Image.new(mode, image.size)
    for band in bands:
        values = np.asarray(image.crop(band))
        part = Image.fromarray((values >> 8).astype(np.uint8))
        if mode == "LA":  # the value is compared in 16 bits, as the file means it
            part = Image.merge("LA", (part, Image.fromarray(np.uint8(255) * (values != clear).astype(np.uint8))))
        grey.paste(part, band[:2])
    return grey


def mend_transparency(image: Image.Image, stored: str) -> Image.Image:
    """Return a decoded PNG whose transparent value is in the scale of its pixels, as Pillow leaves it in the file's.

    `stored` is the raw mode of the file. Of a colour with 16 bits a channel 8 are left, which no longer say whether a
    pixel is the transparent colour: the value becomes None.
    """
    clear = image.info.get("transparency")
    if stored in _SPREAD and isinstance(clear, int):
        image.info["transparency"] = clear * _SPREAD[stored]
    elif stored.startswith("RGB;16") and clear is not None:
        image = image.copy()
        image.info["transparency"] = None
    return image


def on_background(image: Image.Image, colour: tuple[int, int, int], name: str) -> Image.Image:
    """Return an image with transparency as RGB on a colour. Raises ImageError where the transparent pixels are lost."""
    if image.info.get("transparency", 0) is None:
        raise ImageError(
            f"{name} is a PNG with 16 bits a channel and one transparent colour (tRNS), which a background cannot "
            "replace; convert it to RGBA first, or give no background."
        )
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
        colours = values if values.ndim == 2 else values[:, :, :3]  # alpha may be bright where the image is not
        check_depth((colours[top:bottom] for top, bottom in _blocks(*values.shape[1::-1])), name)
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


def _blocks(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last row, exclusive, of blocks of about a million pixels."""
    rows = max(1, _BLOCK_PIXELS // width)
    return ((top, min(top + rows, height)) for top in range(0, height, rows))
