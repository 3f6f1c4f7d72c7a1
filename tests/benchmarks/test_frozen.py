"""The epochs with and without the store are those of one training."""

import re

import pytest

from benchmarks.__main__ import main


@pytest.mark.release
@pytest.mark.parametrize("more", [[], ["--lora"]])
def test_both_ways_have_the_same_losses(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frozen", "--images", "2", "--batch", "1", "--rounds", "1", "--threads", "1", *more]) == 0
    printed = capsys.readouterr().out
    plain, stored = re.findall(r"losses \((.*)\)", printed)
    assert len(plain.split(", ")) == 4
    assert [float(loss) for loss in stored.split(", ")] == pytest.approx([float(loss) for loss in plain.split(", ")])
    assert re.search(r"second epoch, CPU time: .* times faster\n$", printed)
