"""What the tests let other processes do, apart from them so that the processes start quickly."""

import argparse
import os
import signal
import time
from pathlib import Path

import numpy as np
from PIL import Image

from florence2.cli.options.arguments import say
from florence2.errors import OptionError
from florence2.label.decoder import ReadSettings
from florence2.label.processes import when_parent_ends

DEADLY, ENDLESS = 13, 17


class Hostile(ReadSettings):
    """Dies of images 13 pixels wide, and takes for ever for those of 17."""

    def pixels(self, image: Image.Image, room: int) -> np.ndarray:
        if image.width == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        if image.width == ENDLESS:
            time.sleep(600)
        return super().pixels(image, room)


class Unimportable(ReadSettings):
    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (3,)


def note_shard(options: argparse.Namespace) -> int:
    """Leave a file of the shard's name; fail in the second one, and raise an error where that is wanted."""
    if options.refuse:
        raise OptionError(f"Shard {options.shard[0]} is refused.")
    (options.out / "{}-{}".format(*options.shard)).touch()
    say(f"florence2: shard {options.shard[0]}")
    return int(options.shard[0]) - 1


def work_without_end(options: argparse.Namespace) -> int:
    """Work until Ctrl-C, and leave a file then."""
    note_shard(options)
    try:
        time.sleep(600)
    finally:
        (options.out / "{}-{} stopped".format(*options.shard)).touch()
    return 0


def outlive_no_parent(folder: Path) -> None:
    """Leave a file at the start, and another when the process that started this one has ended."""

    def end() -> None:
        (folder / "ended").touch()
        os._exit(0)

    when_parent_ends(end)
    (folder / "started").touch()
    time.sleep(600)
