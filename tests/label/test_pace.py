"""What a run shows."""

import io
from itertools import count

import pytest

from florence2.label.counting import Counting
from florence2.label.pace import Pace
from florence2.label.sources.item import Item
from tests.cli.test_progress import Terminal
from tests.label.conftest import row


def test_images_a_second_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    terminal, log = Pace(Terminal()), Pace(io.StringIO())
    for done, seconds, total in ((1, 0.05, None), (20, 1.95, None), (300, 28.0, None), (420, 12.0, 1000)):
        now[0] += seconds
        for pace in (terminal, log):
            pace.total = total
            pace(done)
    for pace in (terminal, log):
        pace.close()
    assert log._stream.getvalue() == "300 images, 10.0 images/s\n"
    assert terminal._stream.getvalue() == (
        "\r20 images, 10.0 images/s\x1b[K\r300 images, 10.0 images/s\x1b[K"
        "\r420/1000 images, 10.0 images/s, 0:58 left\x1b[K\r\x1b[K"
    )
    assert terminal.describe() == "420 images in 0:42, 10.0 images/s"


def test_images_are_counted_meanwhile() -> None:
    items = [Item(row(str(number)).source) for number in range(250)]
    with Counting(items) as counting:
        counting._thread.join()
        assert counting.total == 250
    with Counting(items[0] for _ in count()) as endless:  # type: ignore[arg-type]
        pass
    assert endless.total is None and not endless._thread.is_alive()
