"""One run at a time writes to a folder."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from florence2.bulk.journal import Folder
from florence2.bulk.lock import LOCK_NAME, FolderLock
from florence2.errors import OptionError

HOLD = """
import sys, time
from pathlib import Path
from florence2.bulk.journal import Folder
folder = Folder(Path(sys.argv[1]), draw=False, settings={"model": "other"})
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with Folder(tmp_path, draw=False, settings={"model": "base"}):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(OptionError, match="Another run is writing to .*; wait until it ends, or choose another"):
            Folder(tmp_path, draw=False, settings={"model": "large"})
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with Folder(tmp_path, draw=False, settings={"model": "large"}):
        pass


def test_a_lock_is_for_everybody_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with FolderLock(tmp_path):
            assert (tmp_path / LOCK_NAME).stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def test_the_folder_under_another_name_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with (
        Folder(tmp_path / "out", draw=False, settings={}),
        pytest.raises(OptionError, match="Another run"),
    ):
        Folder(tmp_path / "link", draw=False, settings={})


def test_a_refused_folder_is_not_left_locked(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").mkdir()
    for _ in range(2):
        with pytest.raises(OptionError, match="is not a regular file"):
            Folder(tmp_path, draw=False, settings={})


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OptionError, match="Another run"):
            Folder(tmp_path, draw=False, settings={})
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    with Folder(tmp_path, draw=False, settings={}):
        assert (tmp_path / LOCK_NAME).exists()


def hold_on(ready: Event) -> None:
    ready.set()
    time.sleep(60)


def test_a_forked_process_holds_no_lock(tmp_path: Path) -> None:
    """A worker of a run that was killed may live for some seconds more."""
    lock = FolderLock(tmp_path)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=hold_on, args=(ready,))
    worker.start()
    try:
        assert ready.wait(60)
        with pytest.raises(OptionError, match="Another run"):  # the worker has not released the lock of its parent
            FolderLock(tmp_path)
        os.close(lock._descriptor)  # the system does no more for a process that is killed
        FolderLock(tmp_path).release()
    finally:
        worker.kill()
        worker.join()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("florence2.bulk.lock._lock_file", refuse)
    with Folder(tmp_path, draw=False, settings={}) as folder:
        assert folder.notes == [f"The file system of {tmp_path} has no locks; start no second run with this folder."]


def test_without_fcntl_the_lock_of_windows_is_used() -> None:
    code = """
import os, sys, types
calls = []
windows = types.ModuleType("msvcrt")
windows.LK_NBLCK, windows.locking = 2, lambda *call: calls.append(call)
sys.modules["msvcrt"], sys.modules["fcntl"] = windows, None
import florence2.errors, pathlib
os.name = "nt"
import florence2.bulk.lock as lock
os.name = "posix"
import tempfile
lock.FolderLock(pathlib.Path(tempfile.mkdtemp())).release()
print([call[1:] for call in calls])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[(2, 1)]\n", done.stderr
