"""The progress bar."""

import io

import pytest

from florence2.cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    terminal, log, single = Terminal(), io.StringIO(), Terminal()
    bars = [Progress(4000, terminal), Progress(4000, log), Progress(1, single)]
    for done, seconds in ((1, 2.0), (2, 2.0), (10, 36.0)):
        now[0] += seconds
        for progress in bars:
            progress.show(done)
    for progress in bars:
        progress.close()
    assert terminal.getvalue().count("\r") == 3 and terminal.getvalue().endswith("\n")
    assert log.getvalue() == "10/4000 images, 4.00 s each, 4:26:00 left\n"
    assert single.getvalue() == ""


def test_it_is_a_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The total comes with each call; a start, at 0, shows nothing yet."""
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    terminal = Terminal()
    with Progress(stream=terminal, things="tensors") as progress:
        progress(0, 5)
        assert terminal.getvalue() == ""
        progress(3, 5)
    assert terminal.getvalue() == "\r3/5 tensors, 0.00 s each, 0:00 left\x1b[K\n"
    assert (progress.done, progress.total) == (3, 5)
