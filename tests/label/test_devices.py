"""How the work is divided among devices, and what becomes of their exit codes."""

import argparse
import io
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from florence2.label.devices import Prefixed, _worst, label_on_devices, split_options
from tests.label.hostile import note_shard, work_without_end


def test_each_device_has_a_shard_and_its_share_of_the_workers() -> None:
    options = argparse.Namespace(devices=["cuda:0", "cuda:1"], shard=None, workers=5, out="out")
    parts = [vars(each) for each in split_options(options)]
    assert [(each["device"], each["shard"], each["workers"]) for each in parts] == [
        ("cuda:0", (1, 2), 2),
        ("cuda:1", (2, 2), 2),
    ]
    assert all(each["out"] == "out" and each["devices"] is None for each in parts)


def test_a_shard_is_divided_further() -> None:
    """The parts of all machines are all images, each once."""
    shards = []
    for part in (1, 2, 3):
        options = argparse.Namespace(devices=["a", "b"], shard=(part, 3), workers=0)
        shards += [each.shard for each in split_options(options)]
    assert sorted(shards) == [(part, 6) for part in range(1, 7)]


@pytest.mark.parametrize(
    ("codes", "worst"), [([0, 0], 0), ([0, 1], 1), ([1, 2], 2), ([2, 130], 130), ([0, -9], 1), ([0, 77], 1)]
)
def test_the_worst_exit_code_counts(codes: list[int], worst: int) -> None:
    assert _worst(codes) == worst


@pytest.mark.release
def test_each_device_has_a_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(devices=["cpu", "cpu"], shard=None, workers=0, out=tmp_path, refuse=False)
    assert label_on_devices(options, note_shard) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-2", "2-2"]
    assert sorted(capfd.readouterr().err.splitlines()) == ["[cpu 1] florence2: shard 1", "[cpu 2] florence2: shard 2"]
    options.refuse = True
    assert label_on_devices(options, note_shard) == 2
    assert "[cpu 2] florence2: Shard 2 is refused." in capfd.readouterr().err.splitlines()
    options.refuse, options.out = False, tmp_path / "absent"
    assert label_on_devices(options, note_shard) == 2
    assert f"{options.out}/1-2 cannot be used: No such file or directory." in capfd.readouterr().err


def test_a_stop_ends_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends its own work first."""
    options = argparse.Namespace(devices=["cpu", "cuda:0"], shard=None, workers=0, out=tmp_path, refuse=False)

    def stop_when_all_work(_: object) -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(SpawnProcess, "join", stop_when_all_work)
    assert label_on_devices(options, work_without_end) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-2", "1-2 stopped", "2-2", "2-2 stopped"]


def test_lines_say_who_wrote_them() -> None:
    stream = io.StringIO()
    words = Prefixed(stream, "[a] ")
    print("one\ntwo", end=" ", file=words)
    print("three", file=words, flush=True)
    assert stream.getvalue() == "[a] one\n[a] two three\n" and not words.isatty()
