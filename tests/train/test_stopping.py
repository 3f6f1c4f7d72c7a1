"""Signals become a flag, and their handlers return after the block."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from florence2.train.stopping import catch_stop_signals


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noted_and_the_second_breaks_in(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with catch_stop_signals(apart=0) as stop:
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received and "Finishing this update and saving." in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_what_comes_twice_within_a_second_is_one() -> None:
    with catch_stop_signals() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.received


@pytest.mark.usefixtures("interruptible")
def test_where_nothing_is_unsaved_the_first_breaks_in() -> None:
    with catch_stop_signals() as stop:
        with pytest.raises(KeyboardInterrupt), stop.immediate():
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # noted again
        with pytest.raises(KeyboardInterrupt), stop.immediate():
            raise AssertionError("the block must not start after a signal")


def test_what_is_ignored_stays_ignored() -> None:
    """Ctrl-C is ignored by the background jobs of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.received
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_in_the_block_leaves_the_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), catch_stop_signals():
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_listen_to_no_signal() -> None:
    def work() -> bool:
        before = signal.getsignal(signal.SIGTERM)
        with catch_stop_signals() as stop:
            return stop.received or signal.getsignal(signal.SIGTERM) != before

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(work).result()
