"""Images in any form: upright, RGB, and as pixel_values."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from florence2.checkpoints.config_files import parse_image_config, read_image_config
from florence2.errors import ConfigError, ImageError, OptionError
from florence2.inputs import arrays
from florence2.inputs.image import image_to_array, open_image, parse_colour
from parity.recipe import GOLDEN, make_picture
from tests.inputs.files_by_hand import png

PUBLISHED = {
    "size": {"height": 768, "width": 768},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def zipped(data: bytes) -> zipfile.ZipFile:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("p.png", data)
    return zipfile.ZipFile(buffer)


def test_every_form_of_input_gives_the_same_image(tmp_path: Path) -> None:
    image = make_picture(1, 40, 30)
    data = saved(image)
    path = tmp_path / "p.png"
    path.write_bytes(data)
    for source in (
        image,
        data,
        bytearray(data),
        path,
        str(path),
        np.asarray(image),
        torch.from_numpy(np.array(image)),
        np.asarray(image).transpose(2, 0, 1),
        torch.from_numpy(np.array(image)).permute(2, 0, 1),
        io.BytesIO(data),
        zipped(data).open("p.png"),
    ):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image)), type(source)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = make_picture(2, 31, 17, "L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(np.asarray(grey).astype(np.int32) * 257)
    elif mode in ("PA", "RGBa"):
        image = grey.convert({"PA": "P", "RGBa": "RGBA"}[mode]).convert(mode)
    else:
        image = grey.convert(mode)
    opened = open_image(image)
    assert opened.mode == "RGB" and opened.size == (31, 17)
    if mode not in ("1", "CMYK", "YCbCr", "P", "PA"):
        assert np.abs(np.asarray(opened).astype(int) - np.asarray(grey)[:, :, None]).max() <= 1


def test_sixteen_bits_from_a_file_and_from_an_array() -> None:
    values = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
    expected = (values >> 8).astype(np.uint8)
    for source in (saved(Image.fromarray(values)), saved(Image.fromarray(values), "TIFF"), values):
        assert np.array_equal(np.asarray(open_image(source))[:, :, 0], expected)


def test_a_mode_without_a_way_to_rgb_gets_a_sentence() -> None:
    with pytest.raises(ImageError, match="colour mode La"):
        open_image(Image.new("LA", (4, 4)).convert("La"))


def test_a_pillow_image_of_floats_is_refused_because_nobody_knows_its_white() -> None:
    with pytest.raises(ImageError, match="float32 values"):
        open_image(Image.fromarray(np.ones((3, 3), np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """The stored image is turned as a camera of that orientation stores it; opened it is upright again."""
    upright = make_picture(3, 24, 16)
    undo: dict[int, Any] = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(saved(stored, exif=exif))
    assert opened.size == (24, 16) and np.array_equal(np.asarray(opened), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_leaves_the_image_as_stored() -> None:
    image = make_picture(3, 24, 16)
    data = saved(image, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert open_image(data).size == (24, 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 7), (7, 3), (5000, 2)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    """The reference reads images 1 or 3 pixels high as channels-first; here they keep their shape."""
    config = parse_image_config(PUBLISHED)
    image = Image.new("RGB", size, (10, 200, 30))
    values = image_to_array(open_image(np.asarray(image)), config)
    expected = (np.array([10, 200, 30]) / 255 - np.array(config.mean)) / np.array(config.std)
    assert values.shape == (1, 3, 768, 768)
    for extreme in (values.max((0, 2, 3)), values.min((0, 2, 3))):
        np.testing.assert_allclose(extreme, expected, atol=1e-6)


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert open_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_truncated_files_get_a_sentence(format: str) -> None:
    data = saved(make_picture(4, 200, 150), format)
    with pytest.raises(ImageError, match=r"cannot be read|is not an image"):
        open_image(data[: len(data) * 2 // 3])


def test_what_is_not_an_image_gets_a_sentence(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    for source, words in (
        (text, "is not an image in a format that is opened here: JPEG"),
        (tmp_path / "absent.jpg", "does not exist"),
        (tmp_path, "is a folder"),
        (b"", "is empty"),
        (5, "must be a path"),
        (np.zeros((4, 20, 20), np.uint8), r"\(H, W\)"),
        (np.zeros((2, 2, 2, 3), np.uint8), "shape"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
    ):
        with pytest.raises(ImageError, match=words):
            open_image(source)  # type: ignore[arg-type]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a handful of bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


def test_decompression_bombs_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(ImageError, match="more than the 178,956,970 pixels"):
        open_image(png_header(60_000, 60_000))


def test_our_own_limit_holds_where_pillow_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="more than the 100 pixels"):
        open_image(make_picture(1, 11, 11))


def test_text_bombs_in_png_are_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (70 << 20), zip=True)
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(saved(make_picture(1, 8, 8), pnginfo=info))


def test_the_opened_image_is_a_copy_that_outlives_its_file(picture_file: Path) -> None:
    opened = open_image(picture_file)
    picture_file.unlink()
    assert opened.getpixel((3, 3)) is not None


def test_pixel_arithmetic_by_hand() -> None:
    """Red 255: (1 - 0.485) / 0.229 = 2.2489; green 0: -0.456 / 0.224 = -2.0357; blue 128: (0.50196 - 0.406) / 0.225."""
    config = parse_image_config(PUBLISHED | {"size": {"height": 2, "width": 3}})
    values = image_to_array(Image.new("RGB", (9, 9), (255, 0, 128)), config)
    assert values.shape == (1, 3, 2, 3) and values.dtype == np.float32
    assert values[0, :, 0, 0].tolist() == pytest.approx([2.24891, -2.03571, 0.42649], abs=1e-5)


def test_rescaling_is_double_and_normalising_single_to_the_last_bit() -> None:
    """numpy's float32 scalars round after every operation; rescaled in single, or all in double, values differ."""
    config = parse_image_config(PUBLISHED | {"size": {"height": 1, "width": 256}})
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    values = image_to_array(open_image(ramp), config)[0, :, 0]
    single, double = values.copy(), values.copy()
    for c in range(3):
        mean, std = PUBLISHED["image_mean"][c], PUBLISHED["image_std"][c]
        for v in range(256):
            assert values[c, v] == (np.float32(v * (1 / 255)) - np.float32(mean)) / np.float32(std)
            single[c, v] = (np.float32(v) * np.float32(1 / 255) - np.float32(mean)) / np.float32(std)
            double[c, v] = (v * (1 / 255) - mean) / std
    assert (single != values).any() and (double != values).any()


def test_the_filter_is_the_one_asked_for() -> None:
    image = make_picture(6, 50, 40)
    by_filter = [image_to_array(image, parse_image_config(PUBLISHED | {"resample": r})) for r in range(6)]
    assert all(not np.array_equal(by_filter[3], other) for i, other in enumerate(by_filter) if i != 3)


def test_published_settings_are_read() -> None:
    config = read_image_config(GOLDEN / "tiny")
    assert (config.height, config.width, config.resample) == (768, 768, 3)


def test_settings_that_a_file_leaves_out_are_those_of_the_clip_processor() -> None:
    config = parse_image_config(PUBLISHED)
    assert (config.resample, config.rescale_factor) == (Image.Resampling.BICUBIC, 1 / 255)


def test_settings_inside_a_processor_config(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(
        '{"image_processor": {"size": {"height": 4, "width": 6}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}}'
    )
    assert (read_image_config(tmp_path).height, read_image_config(tmp_path).width) == (4, 6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"size": {"shortest_edge": 224}}, "size lacks 'height'"),
        ({"size": {"height": 0, "width": 5}}, "each side must be"),
        ({"size": {"height": 5, "width": 8193}}, "each side must be"),
        ({"image_mean": [0.5] * 4}, "three numbers"),
        ({"image_std": [0.5] * 2}, "three numbers"),
        ({"image_mean": [0.5, 0.5, 1_000_001]}, "its numbers must be finite, at most 1,000,000"),
        ({"image_std": [0.5, 0.5, 9e-7]}, "the std above 0"),
        ({"size": {"height": 10**6, "width": 5}}, "each side must be"),
        ({"image_mean": [0.5]}, "three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "std above 0"),
        ({"image_std": [0.5, 0.5, -1]}, "std above 0"),
        ({"image_std": [0.5, 0.5, float("inf")]}, "image_std must be a list of float"),
        ({"image_std": [0.5, 0.5, 1e-300]}, "the std above 0"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean must be a list of float"),
        ({"image_mean": [0.5, 0.5, float("-inf")]}, "image_mean must be a list of float"),
        ({"image_mean": [0.5, 0.5, 10**400]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 10**400]}, "image_std"),
        ({"rescale_factor": 10**400}, "rescale_factor"),
        ({"rescale_factor": 0}, "rescale_factor is 0.0; it must be above 0"),
        ({"rescale_factor": -0.5}, "rescale_factor must be a number from 0 to .*, but is -0.5"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
        ({"rescale_factor": 1.1}, "rescale_factor is 1.1; it must be above 0 and at most 1"),
        ({"resample": 9}, "filter numbers"),
        ({"size": 768}, "must be dict"),
    ],
)
def test_settings_that_nobody_implements_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_image_config(PUBLISHED | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 1, "width": 8192}},
        {"size": {"height": 8192, "width": 1}},
        {"image_mean": [1e6, -1e6, 0]},
        {"image_std": [1e-6, 1, 1e6]},
        {"rescale_factor": 1},
        {"resample": 0},
        {"resample": 5},
        {"do_resize": None},
    ],
    ids=str,
)
def test_settings_at_their_limits_are_read(changes: dict[str, Any]) -> None:
    parse_image_config(PUBLISHED | changes)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(tmp_path / "pipe.png")


def test_closed_images_and_strange_arrays_get_a_sentence(picture_file: Path) -> None:
    image = Image.open(picture_file)
    image.close()
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(image)
    for tensor in (torch.zeros(4, 4, 3, requires_grad=True), torch.zeros(4, 4, 3, dtype=torch.bfloat16)):
        with pytest.raises(ImageError, match="A Tensor cannot be read as an array"):
            open_image(tensor)  # type: ignore[arg-type]


# ---- transparency ----------------------------------------------------------------------------------------------------


def logo(mode: str = "RGBA") -> Image.Image:
    """A red pixel, a half transparent green one, and a transparent one that hides black."""
    image = Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(255, 0, 0, 255), (0, 255, 0, 128), (0, 0, 0, 0)]):
        image.putpixel((x, 0), colour)
    return image.convert(mode)


def test_alpha_is_dropped_as_in_the_reference() -> None:
    assert np.asarray(open_image(logo())).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 0]]]


@pytest.mark.parametrize("source", [logo(), saved(logo()), np.asarray(logo()), np.asarray(logo()) / 255])
def test_a_background_shows_through(source: Any) -> None:
    assert np.asarray(open_image(source, "white")).tolist() == [[[255, 0, 0], [127, 255, 127], [255, 255, 255]]]
    assert np.asarray(open_image(source, (0, 0, 255))).tolist() == [[[255, 0, 0], [0, 128, 127], [0, 0, 255]]]


def test_every_kind_of_transparency_gets_the_background() -> None:
    grey = logo("LA")
    assert open_image(grey, "white").getpixel((2, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    for data in (saved(palette, transparency=0), saved(palette, "GIF", transparency=0), saved(grey)):
        assert open_image(data).getpixel((0, 0)) != (255, 255, 255)
    assert open_image(saved(palette, transparency=0), "#fff").getpixel((0, 0)) == (255, 255, 255)
    opaque = make_picture(1, 5, 5)
    assert np.array_equal(np.asarray(open_image(opaque, "white")), np.asarray(opaque))


GREY_VALUES = {1: [0, 1, 1, 0], 2: [0, 1, 2, 3], 4: [0, 1, 7, 15], 8: [0, 1, 127, 255], 16: [0, 255, 256, 65535]}


@pytest.mark.parametrize("bits", GREY_VALUES)
def test_one_transparent_value_of_a_grey_png_gets_the_background(bits: int) -> None:
    """The value in the file is of the file's depth; the pixels have 8 bits once they are read."""
    values = np.array([GREY_VALUES[bits]])
    for clear in GREY_VALUES[bits]:
        data = png(values, bits, 0, struct.pack(">H", clear))
        plain = np.asarray(open_image(data))
        expected = np.where((values == clear)[:, :, None], np.array([255, 0, 9]), plain)
        for source in (data, Image.open(io.BytesIO(data))):
            assert np.array_equal(np.asarray(open_image(source, (255, 0, 9))), expected), clear
        assert np.abs(plain[:, :, 0] - 255 * values / (2**bits - 1)).max() < 1


def test_one_transparent_colour_of_a_png() -> None:
    row = np.array([[0, 0, 0, 255, 0, 0, 1, 2, 3]])
    assert np.asarray(open_image(png(row, 8, 2, struct.pack(">3H", 1, 2, 3)), "white")).tolist() == [
        [[0, 0, 0], [255, 0, 0], [255, 255, 255]]
    ]
    deep = png(row * 257, 16, 2, struct.pack(">3H", 0, 0, 0))
    assert np.asarray(open_image(deep)).tolist() == [[[0, 0, 0], [255, 0, 0], [1, 2, 3]]]
    for source in (deep, Image.open(io.BytesIO(deep))):
        with pytest.raises(ImageError, match=r"16 bits a channel and one transparent colour \(tRNS\).*convert it to"):
            open_image(source, "white")


@pytest.mark.parametrize("colour", [np.array([1, 2, 3], np.uint8), [np.int64(1), 2, 3], torch.tensor([1, 2, 3])])
def test_a_colour_may_be_a_pixel_of_an_array(colour: Any) -> None:
    assert parse_colour(colour) == (1, 2, 3)


@pytest.mark.parametrize("colour", ["no colour", "", 5, (1, 2), (1, 2, 300), (1, 2, 2.5), b"white", [True, 0, 0], {}])
def test_what_is_not_a_colour(colour: Any) -> None:
    with pytest.raises(OptionError, match="it must be a colour, such as 'white'"):
        parse_colour(colour)


# ---- decoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("x"), ValueError("x"), struct.error("x"), RuntimeError(), KeyError("x")])
@pytest.mark.parametrize("lazy", [False, True])
def test_errors_of_decoders_get_a_sentence(
    error: Exception, lazy: bool, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Image.open(picture_file) if lazy else picture_file

    def load(self: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ImageError, match="cannot be read: "):
        open_image(source)


def test_an_image_for_which_memory_does_not_suffice(picture_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ImageError, match="needs more memory than is free"):
        open_image(picture_file)


def test_images_that_need_two_copies_have_a_lower_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion and turning hold two images of four bytes a pixel."""
    monkeypatch.setattr(arrays, "MAX_COPIED_PIXELS", 100)
    image = make_picture(1, 11, 11)
    exif = Image.Exif()
    exif[0x0112] = 6
    for source in (image, image.convert("L"), saved(Image.new("I;16", (11, 11)))):
        assert open_image(source).size == (11, 11)
    heavy: list[Any] = [image.convert("RGBA"), image.convert("CMYK"), saved(image, exif=exif)]
    for source in (*heavy, np.zeros((11, 11, 4), np.uint8)):
        with pytest.raises(ImageError, match=r"11 x 11 pixels in mode .*More than 100 are read only as upright RGB"):
            open_image(source)


@pytest.mark.parametrize("most", [255, 65535])
@pytest.mark.parametrize("kind", [b"P6", b"P3"])
def test_eight_bit_values_in_a_deep_ppm_are_refused(kind: bytes, most: int) -> None:
    values = np.asarray(make_picture(1, 30, 20))
    if kind == b"P3":
        data = " ".join(map(str, values.flatten())).encode()
    else:
        data = values.astype(">u2" if most > 255 else "u1").tobytes()
    file = b"%s\n30 20\n%d\n" % (kind, most) + data
    if most == 255:
        assert np.array_equal(np.asarray(open_image(file)), values)
        return
    with pytest.raises(ImageError, match="would be almost black"):
        open_image(file)


def test_a_pointer_of_git_lfs_is_not_an_image() -> None:
    with pytest.raises(ImageError, match="is a Git LFS pointer"):
        open_image(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
