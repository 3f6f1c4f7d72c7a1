"""Signals become an answer to be asked for, and go where they went before."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from florence2.train.stopping import asked_to_stop


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noted_and_the_second_breaks_in(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with asked_to_stop(apart=0) as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked and "which will be saved" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_what_comes_twice_within_a_second_is_one() -> None:
    with asked_to_stop() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.asked


@pytest.mark.usefixtures("interruptible")
def test_where_nothing_is_unsaved_the_first_breaks_in() -> None:
    with asked_to_stop() as stop:
        with pytest.raises(KeyboardInterrupt), stop.at_once():
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # noted again
        with pytest.raises(KeyboardInterrupt), stop.at_once():
            raise AssertionError("not to be entered by who was asked before")


def test_what_is_ignored_stays_ignored() -> None:
    """As Ctrl-C is by what a script runs in its background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with asked_to_stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.asked
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_in_the_block_leaves_the_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), asked_to_stop():
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_listen_to_no_signal() -> None:
    def work() -> bool:
        before = signal.getsignal(signal.SIGTERM)
        with asked_to_stop() as stop:
            return stop.asked or signal.getsignal(signal.SIGTERM) != before

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(work).result()
