"""TIFF files in every form of samples: read rightly, or refused with the name of the form."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from florence2.errors import ImageError
from florence2.inputs.checks.tiff import _COLOURS
from florence2.inputs.image import open_image
from tests.inputs.files_by_hand import tiff
from tests.inputs.test_image import saved

SUB_IMAGES = {254: (4, [1]), 330: (4, [8])}


def values_of(bits: int, type: int, samples: int, extra: Sequence[int] = ()) -> np.ndarray:
    """(6, 7, samples) values over the whole range of their form, with opaque alpha."""
    random = np.random.default_rng(bits + type + samples)
    if type == 3:
        return random.random((6, 7, samples))
    highest = 2 ** min(bits - (type == 2), 62) - 1
    values = random.integers(0, highest, (6, 7, samples), endpoint=True)
    values[0, 0], values[0, 1] = 0, highest
    if extra and extra[-1] in (1, 2):
        values[:, :, -1] = highest
    return values


def shown(values: np.ndarray, bits: int, photometric: int) -> np.ndarray:
    """The RGB values 0..255 that unsigned samples mean."""
    share: np.ndarray = values / (2**bits - 1)
    if photometric == 5:
        share = (1 - share[:, :, :3]) * (1 - share[:, :, 3:4])
    elif photometric != 2:
        share = np.repeat(1 - share[:, :, :1] if photometric == 0 else share[:, :, :1], 3, 2)
    rgb: np.ndarray = share[:, :, :3] * 255
    return rgb


FORMS = [
    (photometric, samples, extra)
    for photometric, samples, extras in (
        (0, 1, [()]),
        (1, 1, [()]),
        (1, 2, [(0,), (2,)]),
        (2, 3, [()]),
        (2, 4, [(), (0,), (1,), (2,)]),
        (5, 4, [()]),
        (5, 5, [(0,)]),
    )
    for extra in extras
]


@pytest.mark.parametrize(("photometric", "samples", "extra"), FORMS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 16, 32, 64])
def test_every_form_is_read_rightly_or_refused_by_name(
    photometric: int, samples: int, extra: tuple[int, ...], bits: int
) -> None:
    values = values_of(bits, 1, samples, extra)
    for order, planar, deflate in itertools.product("<>", (False, True), (False, True)):
        data = tiff(values, bits, photometric, order=order, planar=planar, deflate=deflate, extra=extra)
        try:
            opened = np.asarray(open_image(data))
        except ImageError as error:
            range_unknown = bits == 32 and "its range is unknown" in str(error)
            assert range_unknown or f"is a TIFF of a form that is not read here: {bits}-bit " in str(error)
        else:
            assert np.abs(opened - shown(values, bits, photometric)).max() <= 2, (order, planar, deflate)


@pytest.mark.parametrize(
    ("photometric", "samples", "bits"), [(0, 1, 8), (1, 1, 8), (1, 1, 16), (2, 3, 8), (2, 3, 16), (5, 4, 8), (5, 4, 16)]
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_common_forms_are_read(photometric: int, samples: int, bits: int, order: str) -> None:
    values = values_of(bits, 1, samples)
    for deflate in (False, True):
        opened = np.asarray(open_image(tiff(values, bits, photometric, order=order, deflate=deflate)))
        assert np.abs(opened - shown(values, bits, photometric)).max() <= 2


@pytest.mark.parametrize(("photometric", "samples"), [(1, 1), (2, 3), (2, 4), (5, 4)])
def test_planes_of_8_bits_are_read(photometric: int, samples: int) -> None:
    values = values_of(8, 1, samples)
    opened = np.asarray(open_image(tiff(values, 8, photometric, planar=True)))
    assert np.abs(opened - shown(values, 8, photometric)).max() <= 2


@pytest.mark.parametrize(
    ("photometric", "samples", "bits", "type", "planar", "words"),
    [
        (0, 1, 16, 1, False, "16-bit grey, where 0 is white"),
        (1, 1, 12, 1, False, "12-bit grey"),
        (1, 1, 8, 2, False, "8-bit signed grey"),
        (1, 1, 16, 2, False, "16-bit signed grey"),
        (2, 3, 16, 2, False, "16-bit signed RGB"),
        (1, 1, 16, 3, False, "16-bit float grey"),
        (1, 1, 32, 3, False, "32-bit float grey"),
        (1, 1, 64, 3, False, "64-bit float grey"),
        (2, 3, 32, 3, False, "32-bit float RGB"),
        (2, 3, 16, 1, True, "16-bit RGB, each channel in a plane of its own"),
        (2, 4, 16, 1, True, "16-bit RGB, 1 further channel, each channel in a plane of its own"),
        (5, 4, 16, 1, True, "16-bit CMYK, each channel in a plane of its own"),
        (0, 1, 8, 1, True, "8-bit grey, where 0 is white, each channel in a plane of its own"),
        (1, 5, 8, 1, False, "8-bit grey, 4 further channels"),
        (3, 1, 16, 1, False, "16-bit palette"),
        (9, 3, 8, 1, False, r"8-bit ICC L\*a\*b\*"),
        (7, 1, 8, 1, False, "8-bit samples of photometric interpretation 7"),
    ],
)
def test_refused_forms_are_named(
    photometric: int, samples: int, bits: int, type: int, planar: bool, words: str, tmp_path: Path
) -> None:
    data = tiff(values_of(bits, type, samples), bits, photometric, type=type, planar=planar)
    path = tmp_path / "scan.tif"
    path.write_bytes(data)
    for source, name in ((data, "The data"), (path, str(path)), (io.BytesIO(data), "The file object's data")):
        with pytest.raises(ImageError, match=f"is a TIFF of a form that is not read here: {words}. Convert") as raised:
            open_image(source)
        assert str(raised.value).startswith(name)


def test_pillow_images_of_such_forms_are_refused_decoded_or_not() -> None:
    data = tiff(values_of(16, 1, 1), 16, 0)
    decoded = Image.open(io.BytesIO(data))
    decoded.load()
    for image in (Image.open(io.BytesIO(data)), decoded):
        with pytest.raises(ImageError, match="The image is a TIFF of a form .* 16-bit grey, where 0 is white"):
            open_image(image)


def test_whole_numbers_of_32_bits_are_read_where_they_are_of_16() -> None:
    values = np.linspace(0, 65535, 42, dtype=np.int64).reshape(6, 7, 1)
    for type in (1, 2):
        assert np.array_equal(np.asarray(open_image(tiff(values, 32, 1, type=type)))[:, :, 0], values[:, :, 0] >> 8)
        with pytest.raises(ImageError, match="its range is unknown"):
            open_image(tiff(values * 300, 32, 1, type=type))


def test_colours_that_are_subsampled_and_not_compressed_are_refused() -> None:
    grey = np.full((6, 8, 3), 128)
    assert open_image(tiff(grey, 8, 6, tags={530: (3, [1, 1])})).getpixel((3, 3)) == (128, 128, 128)
    assert open_image(saved(Image.new("YCbCr", (8, 6)), "TIFF")).size == (8, 6)
    for stated in ({530: (3, [2, 2])}, {530: (3, [2, 1])}, {}):  # 2, 2 where it is not stated
        with pytest.raises(ImageError, match="8-bit YCbCr, subsampled colours"):
            open_image(tiff(grey, 8, 6, tags=stated))


CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3, 9: 3, 10: 3, 32844: 1, 32845: 3}


@pytest.mark.parametrize("photometric", CHANNELS)
def test_every_colour_space_has_its_name_and_its_channels(photometric: int) -> None:
    name, channels = _COLOURS[photometric][0], CHANNELS[photometric]
    assert _COLOURS.keys() == CHANNELS.keys()
    for further, words in ((0, ""), (1, ", 1 further channel"), (2, ", 2 further channels")):
        values = values_of(64, 1, channels + further)
        with pytest.raises(ImageError) as raised:
            open_image(tiff(values, 64, photometric))
        end = ", subsampled colours" if photometric == 6 else ""
        assert f"not read here: 64-bit {name}{words}{end}. Convert it" in str(raised.value)


@pytest.mark.parametrize(
    ("type", "words"), [(2, "signed "), (3, "float "), (4, "untyped "), (5, "complex "), (9, "untyped ")]
)
def test_every_type_has_its_name(type: int, words: str) -> None:
    data = tiff(values_of(8, 1, 1), 8, 1, tags={339: (3, [type])})
    with pytest.raises(ImageError, match=f"not read here: 8-bit {words}grey. Convert"):
        open_image(data)


def test_one_depth_may_stand_for_all_channels() -> None:
    values = values_of(8, 1, 3)
    data = tiff(values, 8, 2, planar=True, deflate=True, tags={258: (3, [8])})
    assert np.array_equal(np.asarray(open_image(data)), values)


def test_a_reversed_order_of_bits_is_named() -> None:
    with pytest.raises(ImageError, match="16-bit RGB, the lowest bit first"):
        open_image(tiff(values_of(16, 1, 3), 16, 2, tags={266: (3, [2])}))


def test_a_tiff_without_its_places_is_damaged() -> None:
    values = values_of(64, 3, 1)
    with pytest.raises(ImageError, match="64-bit float grey"):
        open_image(tiff(values, 64, 1, type=3, tags={273: None, 324: (4, [8])}))  # tiles for strips
    for missing in (256, 257, 273):
        with pytest.raises(ImageError, match="begins as TIFF, but is damaged"):
            open_image(tiff(values, 64, 1, type=3, tags={missing: None}))


def test_an_unknown_compression_is_named() -> None:
    with pytest.raises(ImageError, match="8-bit grey, compression 34712"):
        open_image(tiff(values_of(8, 1, 1), 8, 1, tags={259: (3, [34712])}))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tiff(values_of(8, 1, 3), 8, 2, tags={50706: (1, [1, 4, 0, 0])}), "DNG"),
        (tiff(values_of(8, 1, 3), 8, 2, tags=SUB_IMAGES), "TIFF with a thumbnail before its photo"),
        (tiff(values_of(12, 1, 1), 12, 32803), "TIFF with a sensor's values"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(60), "CR2"),
        (b"IIRO\x08\0\0\0" + bytes(40), "ORF"),
        (b"IIU\0\x18\0\0\0" + bytes(40), "RW2"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(40), "RAF"),
        (b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom" + bytes(40), "CR3"),
    ],
)
def test_a_cameras_raw_file_is_called_one(data: bytes, words: str) -> None:
    """Read as a TIFF, many of them would give their thumbnail."""
    with pytest.raises(ImageError, match=f"is in the format {words}, a camera's raw file, which is not opened here"):
        open_image(data)


def test_a_cr2_that_pillow_opens_is_refused_too() -> None:
    """Its tags are those of a TIFF with a JPEG; here the mark is written over the first pixels of one."""
    data = bytearray(tiff(values_of(8, 1, 3), 8, 2))
    data[8:11] = b"CR\x02"
    for source in (bytes(data), Image.open(io.BytesIO(bytes(data)))):
        with pytest.raises(ImageError, match="format CR2, a camera's raw file"):
            open_image(source)


def test_a_full_image_with_smaller_copies_is_read() -> None:
    """So are the levels of a pyramid stored; only a thumbnail that comes first hides another image."""
    values = values_of(8, 1, 3)
    for kind in ((4, [0]), (4, [2]), None):
        data = tiff(values, 8, 2, tags={254: kind, 330: (4, [8])})
        assert np.array_equal(np.asarray(open_image(data)), values)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the same
@pytest.mark.parametrize("cut", [8, 20, 60])
def test_a_damaged_tiff_is_called_so(cut: int) -> None:
    data = saved(Image.new("RGB", (8, 8)), "TIFF")[:cut]
    with pytest.raises(ImageError, match="begins as TIFF, but is damaged"):
        open_image(data)
