"""Signals become an answer to be asked for, and go where they went before."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from florence2.train.stopping import asked_to_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noted_and_the_second_breaks_in(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with asked_to_stop(apart=0) as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked() and asked()
        assert "once more stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_what_comes_twice_within_a_second_is_one() -> None:
    with asked_to_stop() as asked:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert asked()


def test_an_error_in_the_block_leaves_the_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), asked_to_stop():
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_are_never_asked() -> None:
    def work() -> bool:
        with asked_to_stop() as asked:
            return asked()

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(work).result()
