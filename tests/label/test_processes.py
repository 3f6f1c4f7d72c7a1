"""Processes that a run starts end with it."""

import subprocess
import sys
import time
from pathlib import Path

START = """
import sys
from multiprocessing import get_context
from pathlib import Path
from tests.label.hostile import outlive_no_parent
process = get_context("spawn").Process(target=outlive_no_parent, args=(Path(sys.argv[1]),))
process.start()
process.join()
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", START, str(tmp_path)])
    wait_for(tmp_path / "started")
    assert not (tmp_path / "ended").exists()
    parent.kill()
    parent.wait()
    wait_for(tmp_path / "ended")
