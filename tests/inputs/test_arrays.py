"""Arrays and tensors as images, and images deeper than 8 bits."""

import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from florence2.errors import ImageError
from florence2.inputs import arrays
from florence2.inputs.image import open_image
from tests.inputs.test_image import saved


def test_channels_come_first_only_where_the_last_dimension_cannot_be_channels() -> None:
    """(3, 20, 3) is 3 pixels high, (3, 20, 4) has alpha, (3, 20, 1) is grey; (3, 20, 5) begins with its channels."""
    values = np.random.default_rng(0).integers(0, 256, (3, 20, 5), np.uint8)
    for last, size in ((1, (20, 3)), (3, (20, 3)), (4, (20, 3)), (5, (5, 20))):
        for array in (values[:, :, :last], torch.from_numpy(values[:, :, :last].copy())):
            assert open_image(array).size == size
    deep = values.astype(np.uint16) * 257
    assert np.array_equal(np.asarray(open_image(deep)), values.transpose(1, 2, 0))


def test_a_row_of_more_pixels_than_a_block_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_BLOCK_PIXELS", 4)
    values = np.random.default_rng(0).random((7, 5, 3))
    for width in (5, 2):  # one row a block, and two
        expected = np.rint(values[:, :width] * 255)
        assert np.abs(np.asarray(open_image(values[:, :width])) - expected).max() <= 1


def deep(low: int, high: int) -> np.ndarray:
    return np.linspace(low, high, 6 * 5, dtype=np.uint16).reshape(6, 5)


def as_file(values: np.ndarray, format: str = "PNG") -> bytes:
    return saved(Image.fromarray(values), format)


def png_of_deep_colour(highest: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write: 2 x 2 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + struct.pack(">6H", 0, highest, 0, highest, 0, highest) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("highest", [1, 200, 255, 256, 1023, 4095])
def test_values_of_few_bits_in_deep_integers_are_refused(highest: int) -> None:
    """They would be black: 255 of 65,535, as 8-bit values in 16 bits are, and 12-bit values."""
    values = deep(0, highest)
    sources: list[Any] = [values, values.astype(">u2"), values[::-1], np.stack([values] * 3, axis=2)]
    sources += [np.stack([values] * 3), as_file(values), as_file(values, "TIFF"), Image.fromarray(values)]
    sources += [as_file(values.astype(np.int32), "TIFF"), Image.fromarray(values.astype(np.int32))]
    for source in sources:
        with pytest.raises(ImageError, match=f"16-bit values of at most {highest:,}, so it would be almost black"):
            open_image(source)
    with pytest.raises(ImageError, match="16-bit values of less than"):
        open_image(png_of_deep_colour(highest))


def test_bright_and_black_deep_images_are_read() -> None:
    for source in (deep(0, 4096), as_file(deep(0, 4096)), as_file(deep(0, 65535).astype(np.int32), "TIFF")):
        assert np.asarray(open_image(source)).max() >= 16
    for black in (deep(0, 0), as_file(deep(0, 0))):
        assert np.asarray(open_image(black)).max() == 0
    assert open_image(png_of_deep_colour(0xABCD)).getpixel((0, 0)) == (0, 0xAB, 0)


def test_floats_in_0_to_1_are_the_image() -> None:
    values = np.random.default_rng(1).integers(0, 256, (7, 5, 3), np.uint8)
    values[0, 0], values[0, 1] = 0, 255
    image = torch.from_numpy(values).permute(2, 0, 1).float() / 255  # as torchvision's ToTensor gives it
    for source in (
        image,
        image.permute(1, 2, 0),
        image.double(),
        image.numpy(),
        values / 255,
        np.float16(values / 255),
    ):
        assert np.array_equal(np.asarray(open_image(source)), values), source.dtype
    assert np.array_equal(np.asarray(open_image(image[:1]))[:, :, 0], values[:, :, 0])  # (1, H, W)
    assert np.array_equal(np.asarray(open_image(image[0]))[:, :, 0], values[:, :, 0])  # (H, W)


@pytest.mark.parametrize("wrong", [255.0, 1.01, -0.01, float("nan"), float("inf")])
def test_floats_outside_0_to_1_are_refused(wrong: float) -> None:
    values = np.full((3, 20, 20), 0.5, np.float32)
    values[1, 2, 3] = wrong
    for source in (values, torch.from_numpy(values), values.transpose(1, 2, 0)):
        with pytest.raises(ImageError, match="but floats must be in 0..1. Divide"):
            open_image(source)


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "uint32", "int64", "bool", "complex64", "U1", "object"])
def test_other_types_get_a_sentence(kind: str) -> None:
    with pytest.raises(ImageError, match=f"not .*{kind[:4]}|not <U1"):
        open_image(np.zeros((4, 4, 3)).astype(kind))


@pytest.mark.parametrize(
    "shape", [(), (5,), (2, 2, 2, 3), (1, 3, 9, 9), (4, 4, 2), (5, 5, 5), (4, 20, 20), (2, 20, 20), (1, 1, 1, 1, 1)]
)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_other_shapes_get_a_sentence(shape: tuple[int, ...], kind: str) -> None:
    with pytest.raises(ImageError, match=r"must have the shape \(H, W\)"):
        open_image(np.zeros(shape, kind))


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0), (0, 5), (3, 0, 5), (3, 5, 0), (0, 5, 4), (1, 0, 9)])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_empty_arrays_get_a_sentence(shape: tuple[int, ...], kind: str) -> None:
    with pytest.raises(ImageError, match="is empty|must have the shape"):
        open_image(np.zeros(shape, kind))


def test_strides_do_not_matter() -> None:
    values = np.random.default_rng(2).integers(0, 256, (30, 20, 3), np.uint8)
    big = np.zeros((60, 60, 5), np.uint8)
    big[::2, ::3, 1:4] = values
    for source in (values[::-1, ::-1][::-1, ::-1], np.asfortranarray(values), big[::2, ::3, 1:4], values[..., ::-1]):
        assert np.array_equal(np.asarray(open_image(source)), source)
    read_only = values.copy()
    read_only.flags.writeable = False
    assert np.array_equal(np.asarray(open_image(read_only)), values)


def test_large_arrays_are_read_block_by_block() -> None:
    """2.4 million pixels are several blocks."""
    values = np.random.default_rng(3).integers(0, 65536, (1200, 2000), np.uint16)
    for source in (values, saved(Image.fromarray(values), compress_level=0)):
        assert np.array_equal(np.asarray(open_image(source))[:, :, 0], values >> 8)
    colours = np.random.default_rng(3).integers(0, 256, (1200, 2000, 3), np.uint8)
    assert np.array_equal(np.asarray(open_image(colours)), colours)


@pytest.mark.parametrize("value", [np.uint8(7), np.uint16(60000), np.float32(0.5)])
@pytest.mark.parametrize("shape", [(100_000, 100_000), (100_000, 100_000, 3), (3, 100_000, 100_000)])
def test_broadcast_arrays_are_refused_before_they_are_copied(value: Any, shape: tuple[int, ...]) -> None:
    tracemalloc.start()
    with pytest.raises(ImageError, match="more than the 178,956,970 pixels"):
        open_image(np.broadcast_to(value, shape))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_tensors_that_numpy_cannot_read_get_the_remedy() -> None:
    for tensor in (torch.zeros(4, 4, 3, requires_grad=True), torch.zeros(4, 4, 3, dtype=torch.bfloat16)):
        with pytest.raises(ImageError, match="Give a tensor on the CPU, without gradients, in uint8 or float32"):
            open_image(tensor)  # type: ignore[arg-type]
