"""Signals that wait."""

import signal

import pytest

from florence2.export.waiting import signals_wait


def test_a_signal_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with signals_wait():
            signal.raise_signal(signal.SIGINT)
            done.append("the block")
        done.append("what follows")
    assert done == ["the block"]
    with signals_wait():
        done.append("no signal")
    assert done[-1] == "no signal"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
