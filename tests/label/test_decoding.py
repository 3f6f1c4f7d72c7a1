"""Processes that read images: the same pixels as in the process itself, and one that dies or hangs costs one image."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from florence2.bulk.rows import TaskQuestion
from florence2.bulk.sources import Source
from florence2.errors import Florence2Error, ImageError, OptionError
from florence2.inputs.image import ImageConfig, open_image, resize_image
from florence2.label.ahead import Taken, Waited, read_ahead
from florence2.label.decoder import ReadSettings
from florence2.label.decoding import Decoders
from parity.recipe import make_picture
from tests.label.hostile import DEADLY, ENDLESS, Hostile, Unimportable

CONFIG = ImageConfig(32, 24, (0.5,) * 3, (0.5,) * 3)


def save(folder: Path, *widths: int) -> list[Path]:
    for number, width in enumerate(widths):
        make_picture(number, width, 10).save(folder / f"{number:02}.png")
    return sorted(folder.iterdir())


def test_pixels_are_those_of_this_process(tmp_path: Path) -> None:
    paths = save(tmp_path, 40, 60)
    with Decoders(2, ReadSettings(CONFIG)) as decoders:
        reading = [decoders.submit("x", content) for content in (*paths, paths[0].read_bytes(), Path("absent.png"))]
        for future, path in zip(reading, (*paths, paths[0]), strict=False):
            image = open_image(path)
            assert np.array_equal(future.result().pixels, resize_image(image, CONFIG))
            assert future.result().size == image.size
        with pytest.raises(ImageError, match=r"absent\.png does not exist"):
            reading[-1].result()


def test_images_that_the_device_resizes_come_as_they_are(tmp_path: Path) -> None:
    """Unless they are larger than the shared memory, or than a device takes."""
    paths = save(tmp_path, 20, 70, 200)
    with Decoders(1, ReadSettings(CONFIG, longest=100), room=3 * 32 * 24) as decoders:
        shapes = [decoders.submit("x", path).result().pixels.shape for path in paths]
    assert shapes == [(10, 20, 3), (10, 70, 3), (32, 24, 3)]
    with Decoders(1, ReadSettings(CONFIG, longest=100)) as decoders:
        assert decoders.submit("x", b"").exception() is not None
        assert decoders.submit("x", save(tmp_path, 90)[0]).result().pixels.shape == (32, 24, 3)


def test_a_decoder_that_dies_or_hangs_costs_one_image(tmp_path: Path) -> None:
    paths = save(tmp_path, 40, DEADLY, 41, ENDLESS, 42)
    with Decoders(1, Hostile(CONFIG), seconds=0.5) as decoders:
        results = [decoders.submit(path.name, path) for path in paths]
        errors = [str(each.exception() or "") for each in results]
    assert errors == [
        "",
        "01.png cannot be read: the decoder died.",
        "",
        "03.png cannot be read: the decoder took more than 0.5 s and was ended.",
        "",
    ]


def test_closing_waits_for_no_image(tmp_path: Path) -> None:
    (path,) = save(tmp_path, ENDLESS)
    with Decoders(1, Hostile(CONFIG)) as decoders:
        hanging, never = decoders.submit("x", path), decoders.submit("x", path)
        while not hanging.running():
            time.sleep(0.01)
        time.sleep(0.2)
        started = time.monotonic()
    assert time.monotonic() - started < 20 and never.cancelled()
    with pytest.raises(Florence2Error):
        hanging.result()


def test_processes_that_cannot_start_are_a_sentence_and_no_error_of_an_image() -> None:
    with Decoders(1, Unimportable(CONFIG)) as decoders, pytest.raises(OptionError, match="No decode worker can be"):
        list(read_ahead(taken(b"x"), decoders, 4, Waited()))


def test_too_little_shared_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(_: int, __: int, size: int) -> None:
        asked.append(size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OptionError, match=r"too little shared memory .*No space left.* --workers 0"):
        Decoders(2, ReadSettings(CONFIG), room=40_000)
    assert asked == [40_000, 10_000, 2500, 2304]


def taken(*contents: object) -> list[Taken]:
    return [
        Taken(Source(str(number), b"", str(number)), (TaskQuestion("<OD>"),), None, content)
        for number, content in enumerate(contents)
    ]


def test_images_come_in_order_and_are_taken_ahead(tmp_path: Path) -> None:
    paths = save(tmp_path, *range(40, 52))
    seen = []

    def coming() -> object:
        for each in taken(*paths[:5], ImageError("lost"), *paths[5:]):
            seen.append(each.source.name)
            yield each

    with Decoders(2, ReadSettings(CONFIG)) as decoders:
        waited = Waited()
        results = read_ahead(coming(), decoders, 6, waited)
        first = next(results)
        assert len(seen) == 6
        rest = list(results)
    assert [each.source.name for each in (first, *rest)] == list(map(str, range(13)))
    sizes = [each.content.size[0] if hasattr(each.content, "size") else str(each.content) for each in (first, *rest)]
    assert sizes == [*range(40, 45), "lost", *range(45, 52)] and waited.seconds > 0
