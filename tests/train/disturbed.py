"""Training data that disturb the run when one of them is read."""

import os
import signal
from collections.abc import Callable

from recipes.nano.places import SceneSample
from recipes.nano.train import SceneSamples


class DisturbedSamples(SceneSamples):
    """Scenes; `act` is called before the read number `at`, counted from 1."""

    def __init__(self, seed: int, count: int, at: int, act: Callable[[], object]):
        super().__init__(seed, count)
        self.left, self.act = at, act

    def __getitem__(self, index: int) -> SceneSample:
        self.left -= 1
        if self.left == 0:
            self.act()
        return super().__getitem__(index)


def interrupt() -> None:
    """Stop as Ctrl-C does where nothing catches it."""
    raise KeyboardInterrupt


def send(number: signal.Signals) -> Callable[[], object]:
    """Return a function that sends this process a signal, as a person, a scheduler or the system would."""
    return lambda: os.kill(os.getpid(), number)
