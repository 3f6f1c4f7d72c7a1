"""Images on the device: the same code on a CPU, bit for bit what Pillow and NumPy give."""

import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import florence2
from florence2.bulk.answering import answer_images
from florence2.bulk.rows import TaskQuestion
from florence2.bulk.sources import find_images
from florence2.errors import ImageError
from florence2.fast.cuda import pixels
from florence2.fast.cuda.pixels import DevicePixels
from florence2.inputs.image import ImageConfig, image_to_array
from florence2.processor import HostPixels
from parity.recipe import make_picture
from tests.release import keep

CPU = torch.device("cpu")
EDGES = [(1, 1), (1, 2), (2, 1), (1, 900), (900, 1), (3, 3), (48, 1), (1, 32), (48, 32), (48, 33), (47, 32), (2000, 3)]
"""(width, height) for a target of 48 x 32."""


def config(width: int, height: int, resample: int = 3) -> ImageConfig:
    return ImageConfig(height, width, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resample=resample)


def noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Random bytes, or black and white alone, which a filter's negative weights carry out of 0..255."""
    values = rng.integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values if rng.random() < 0.5 else (values >> 7) * np.uint8(255))


def check(image: Image.Image, settings: ImageConfig) -> None:
    device = DevicePixels()
    values = device.pixel_values([device.read(image, settings)], settings, CPU)
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values.numpy(), image_to_array(image, settings), str((image.size, settings)))


@pytest.mark.parametrize("resample", list(Image.Resampling))
@pytest.mark.parametrize("size", EDGES)
def test_edges(size: tuple[int, int], resample: int) -> None:
    check(noise(np.random.default_rng(sum(size)), *size), config(48, 32, resample))


@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_random_sizes(resample: int) -> None:
    rng = np.random.default_rng(resample)
    for _ in range(40):
        width, height, *target = (int(side) for side in np.exp(rng.uniform(0, 6, 4)))
        check(noise(rng, width, height), config(target[0], target[1], resample))


@pytest.mark.parametrize(
    ("width", "height"),
    keep(
        [1, 3, 4, 6],
        [(640, 480), (480, 640), (123, 457), (1920, 1080), (768, 300), (900, 768), (3000, 50), (720, 1280)],
    ),
)
def test_the_published_size(width: int, height: int) -> None:
    check(noise(np.random.default_rng(0), width, height), config(768, 768))


def test_pieces_make_the_same_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for products in (1, 1000, 40_000):
        monkeypatch.setattr(pixels, "_PRODUCTS", products)
        check(noise(np.random.default_rng(1), 50, 70), config(33, 21))


def test_a_batch_of_several_sizes() -> None:
    settings, rng, device = config(48, 32), np.random.default_rng(2), DevicePixels()
    images = [noise(rng, *size) for size in EDGES]
    values = device.pixel_values([device.read(image, settings) for image in images], settings, CPU)
    expected = np.concatenate([image_to_array(image, settings) for image in images])
    np.testing.assert_array_equal(values.numpy(), expected)


def test_the_host_resizes_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, rng, device = config(48, 32), np.random.default_rng(2), DevicePixels()
    monkeypatch.setattr(pixels, "MAX_DEVICE_PIXELS", 5000)
    monkeypatch.setattr(pixels, "MAX_DEVICE_SIDE", 200)
    for size, kept in (((50, 100), (50, 100)), ((51, 100), (48, 32)), ((200, 2), (200, 2)), ((2, 201), (48, 32))):
        image = noise(rng, *size)
        assert device.read(image, settings).shape[1::-1] == kept
        check(image, settings)


def test_the_host_resizes_where_the_order_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "pass_order", lambda: None)
    image = noise(np.random.default_rng(2), 60, 50)
    assert DevicePixels().read(image, config(48, 32)).shape == (32, 48, 3)
    check(image, config(48, 32))


def test_the_host_takes_images_that_were_read_for_a_device() -> None:
    settings, image = config(48, 32), noise(np.random.default_rng(2), 60, 50)
    values = HostPixels().pixel_values([DevicePixels().read(image, settings)], settings, CPU)
    np.testing.assert_array_equal(values.numpy(), image_to_array(image, settings))


def failing(*_: object) -> int:
    raise OSError("no memory")


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10**12
    monkeypatch.setattr(pixels, "free_bytes", lambda _: free)
    counts = []
    for cores in (None, 1, 4, 64):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        counts.append(DevicePixels().threads)
    assert counts == [1, 1, 4, 16]
    for free in (10**12, 9 * 10**9, 10**6):  # noqa: B007  the lambda reads it
        counts.append(DevicePixels().threads)
    assert counts[4:] == [16, 3, 1]


@pytest.fixture(scope="module")
def nano() -> florence2.Florence2:
    return florence2.load("nano", device="cpu")


@pytest.fixture(scope="module")
def forced(nano: florence2.Florence2) -> florence2.Florence2:
    """The way through a device, with a CPU as the device, and three threads that read."""

    class Threads(DevicePixels):
        threads = 3

    model = florence2.Florence2(nano.model, nano.processor)
    model.pixels = Threads()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(9):
        make_picture(seed, 100 + 60 * seed, 400 - 40 * seed).save(folder / f"{seed}.jpg")
    (folder / "4.jpg").write_bytes(b"not an image")
    return folder


def test_the_device_is_chosen_by_the_model(nano: florence2.Florence2, forced: florence2.Florence2) -> None:
    assert type(nano.choose_pixels()) is HostPixels
    assert forced.choose_pixels() is forced.pixels


@pytest.mark.release
def test_answers_are_the_same(nano: florence2.Florence2, forced: florence2.Florence2, folder: Path) -> None:
    paths = [path for path in sorted(folder.iterdir()) if path.stem != "4"]
    for path in paths[:3]:
        assert forced.prepare_image(path).pixels.shape[1::-1] == forced.prepare_image(path).size
        assert torch.equal(forced.encode_image(path).features, nano.encode_image(path).features)
        assert forced.run("<OD>", path).token_ids == nano.run("<OD>", path).token_ids
    requests = [(task, path) for path in paths for task in ("<CAPTION>", "<OCR_WITH_REGION>")]
    few = nano.options(max_new_tokens=20)
    expected = [answer.token_ids for answer in nano.run_batch(requests, options=few)]
    assert [answer.token_ids for answer in forced.run_batch(requests, options=few)] == expected
    assert [answer.token_ids for answer in forced.stream(requests, options=few)] == expected  # type: ignore[union-attr]


def test_a_batch_reads_ahead_but_in_its_own_thread_what_is_a_file_object(
    nano: florence2.Florence2, forced: florence2.Florence2, folder: Path
) -> None:
    here, readers = threading.get_ident(), set()

    class Opened:
        def __init__(self, path: Path):
            self.file = io.BytesIO(path.read_bytes())

        def read(self, size: int = -1) -> bytes:
            readers.add(threading.get_ident())
            return self.file.read(size)

    def images() -> list[florence2.pipeline.AnyImage]:
        return [
            Opened(folder / "1.jpg"),
            folder / "2.jpg",
            make_picture(3, 70, 50),
            nano.encode_image(folder / "3.jpg"),
        ]

    few = nano.options(max_new_tokens=8)
    expected = [nano.run("<CAPTION>", image, options=few).token_ids for image in images()]
    readers.clear()
    batch = forced.run_batch([("<CAPTION>", image) for image in images()], options=few)
    assert [answer.token_ids for answer in batch] == expected
    assert readers == {here}
    with pytest.raises(ImageError, match=r"4\.jpg"):
        forced.run_batch([("<CAPTION>", folder / f"{seed}.jpg") for seed in range(9)], options=few)


@pytest.mark.release
def test_folder_runs(nano: florence2.Florence2, forced: florence2.Florence2, folder: Path) -> None:
    def rows(model: florence2.Florence2) -> list[object]:
        ask = lambda pairs, arrived: model.stream(  # noqa: E731
            (pair if isinstance(pair, Exception) else ("<CAPTION>", pair[0]) for pair in pairs), max_new_tokens=8
        )
        found = answer_images(model, find_images([str(folder)]), [TaskQuestion("<CAPTION>", None)], ask)
        return [row.error or row.answer.token_ids for row in found]

    assert rows(forced) == rows(nano)
