"""One process that reads images: a path or bytes come through a pipe, the pixels go back through shared memory.

It imports no torch, so it starts quickly and stays small.
"""

import os
import signal
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from florence2.errors import Florence2Error
from florence2.inputs.image import Colour, ImageConfig, open_image, resize_image
from florence2.label.processes import when_parent_ends

Size: TypeAlias = tuple[int, int]
Reply: TypeAlias = "tuple[Size, tuple[int, ...]] | str"
"""The size of the upright image and the shape of its pixels, or why it cannot be read."""


@dataclass(frozen=True)
class ReadSettings:
    """How images are read.

    Attributes:
        config: The size of the model's input, and the filter.
        background: The colour that transparent pixels show.
        longest: The longest side of an image whose own pixels are returned, if they fit into the shared memory; all
            others are resized to the model's input.
    """

    config: ImageConfig
    background: Colour | None = None
    longest: int = 0

    def pixels(self, image: Image.Image, room: int) -> np.ndarray:
        """Return the uint8 values (h, w, 3) of an image, at most `room` of them."""
        own = max(image.size) <= self.longest and 3 * image.width * image.height <= room
        return np.asarray(image) if own else resize_image(image, self.config)


def serve(jobs: "connection.Connection[Reply | None, Path | bytes]", memory: str, reading: ReadSettings) -> None:
    """Read one image after another until the other end of the pipe is closed; first say that all is ready."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach all processes; the parent ends this one
        signal.signal(number, signal.SIG_IGN)
    when_parent_ends(lambda: os._exit(1))  # also in the middle of an image
    block = SharedMemory(memory)
    jobs.send(None)
    while True:
        try:
            content = jobs.recv()
        except (EOFError, OSError):
            break
        jobs.send(_read(content, block, reading))
    block.close()


def _read(content: Path | bytes, block: SharedMemory, reading: ReadSettings) -> Reply:
    try:
        image = open_image(content, reading.background)
        pixels = reading.pixels(image, block.size)
    except Florence2Error as error:
        return str(error)
    except MemoryError:
        return "The image needs more memory than is free; make it smaller first."
    np.ndarray(pixels.shape, np.uint8, block.buf)[...] = pixels
    return image.size, pixels.shape
