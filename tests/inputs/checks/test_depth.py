"""16-bit values that are of fewer bits, with some bright pixels among them."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence2.errors import ImageError
from florence2.inputs.image import open_image
from tests.inputs.files_by_hand import png, tiff
from tests.inputs.test_image import saved


def dim(highest: int, channels: int = 1) -> np.ndarray:
    """(80, 60, channels) values up to `highest`, and two hot pixels."""
    values = np.random.default_rng(1).integers(0, highest, (80, 60, channels), np.uint16, endpoint=True)
    values[7, 5] = values[40, 30] = 65535
    return values


@pytest.mark.parametrize("highest", [1, 255, 1023, 4095])
def test_hot_pixels_do_not_hide_that_an_image_is_dim(highest: int) -> None:
    grey, colour = dim(highest)[:, :, 0], dim(highest, 3)
    alpha = np.dstack([colour, np.full((80, 60), 65535, np.uint16)])
    sources: list[Any] = [grey, grey.astype(">u2"), colour, alpha, Image.fromarray(grey), saved(Image.fromarray(grey))]
    sources += [saved(Image.fromarray(grey), "TIFF"), saved(Image.fromarray(grey.astype(np.int32)), "TIFF")]
    for source in sources:
        with pytest.raises(ImageError, match=r"16-bit values of at most .*, but for the brightest 0.1 %, so it would"):
            open_image(source)
    for data in (png(colour.reshape(80, -1), 16, 2), png(alpha.reshape(80, -1), 16, 6), tiff(colour, 16, 2)):
        with pytest.raises(ImageError, match=r"16-bit values of less than .*, but for the brightest 0.1 %, so it"):
            open_image(data)


def test_alpha_is_not_brightness() -> None:
    values = np.dstack([dim(255, 3), np.full((80, 60), 65535, np.uint16)])
    values[7, 5], values[40, 30] = 9, 9
    with pytest.raises(ImageError, match="16-bit values of at most 255, so it would be almost black"):
        open_image(values)


def test_dark_images_with_bright_places_are_read() -> None:
    """A night sky: two stars on black, or one pixel in a hundred that is bright."""
    sky = np.zeros((80, 60), np.uint16)
    sky[7, 5] = sky[40, 30] = 40_000
    lamps = dim(300)[:, :, 0]
    lamps[::10, ::10] = 30_000
    for values in (sky, lamps, np.dstack([lamps] * 3)):
        assert np.array_equal(np.asarray(open_image(values))[:, :, 0], values.reshape(80, 60, -1)[:, :, 0] >> 8)
    assert np.asarray(open_image(saved(Image.fromarray(sky)))).max() == 40_000 >> 8


def test_black_is_black_in_any_depth() -> None:
    for source in (np.zeros((80, 60, 3), np.uint16), saved(Image.fromarray(np.zeros((80, 60), np.uint16)))):
        assert np.asarray(open_image(source)).max() == 0


def test_dim_ink_would_be_almost_white() -> None:
    values = np.random.default_rng(1).integers(0, 4096, (80, 60, 4), np.uint16)
    with pytest.raises(ImageError, match="16-bit values of less than 4,096, so it would be almost white"):
        open_image(tiff(values, 16, 5))
    black = values.copy()
    black[:, :, 3] *= 15  # black alone is ink enough
    assert np.asarray(open_image(tiff(black, 16, 5))).min() < 100
    values[:40] *= 16
    assert np.asarray(open_image(tiff(values, 16, 5))).min() < 100
