"""Cases whose outcome is known, which show that the suite notices each: the first word of a case is its outcome."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np

from florence2.errors import PromptError
from florence2.inputs.image import image_to_array
from tests.fuzz.worker import Wrong

OUTCOMES = (
    "accepted",
    "refused",
    "escape",
    "silent",
    "silent program",
    "silent message",
    "memory",
    "memory refused",
    "crash",
    "hang",
)


def draw(random: Random) -> str:
    return random.choice(OUTCOMES)


def check(case: str, place: Path) -> None:
    if case == "refused":
        raise PromptError("This is refused.")
    if case == "escape":
        image_to_array(None, None)  # type: ignore[arg-type]
    if case == "silent":
        raise Wrong("nobody notices")
    if case == "silent program":
        try:
            subprocess.run([sys.executable, "-c", ""], check=True)
        finally:
            raise PromptError("The file is refused, but a program has run.")
    if case == "silent message":
        raise PromptError("x" * 30_000)
    if case.startswith("memory"):
        np.ones(5 << 28, np.uint8)
    if case == "memory refused":
        raise PromptError("This is refused too late.")
    if case == "crash":
        os.abort()
    while case == "hang":
        pass
