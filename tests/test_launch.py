"""The program itself: closed, full and broken streams, and signals at any time."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from florence2 import __main__ as program
from parity.recipe import make_picture
from tests.release import keep

FULL = "florence2: stdout cannot be written: No space left on device.\n"


def shell(words: list[object], redirections: str = "") -> "subprocess.CompletedProcess[str]":
    """The program, with redirections by bash; the exit code is the program's own, also in front of a pipe."""
    line = (
        f"{shlex.join([sys.executable, '-m', 'florence2', *map(str, words)])} {redirections}; exit ${{PIPESTATUS[0]}}"
    )
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for i in range(4):
        make_picture(i, 40, 30).save(folder / f"{i}.png")
    return folder


def run_words(album: Path, model: Path, *more: object) -> list[object]:
    return ["run", "od", album, "--model", model, "--max-new-tokens", 3, *more]


@pytest.mark.parametrize(
    ("redirections", "code", "more"),
    keep([1], [(">&- 2>/dev/full", 0, ["--json"]), (">/dev/full", 1, ["--json"]), ("| true", 0, [])]),
)
def test_a_folder_is_complete_whatever_happens_to_the_streams(
    redirections: str, code: int, more: list[str], album: Path, small_folder: Path, tmp_path: Path
) -> None:
    done = shell(run_words(album, small_folder, "--out", tmp_path / "out", *more), redirections)
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    rows = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(rows) == 4 and all("task" in json.loads(row) for row in rows)
    if redirections == ">/dev/full":
        assert "stdout cannot be written: No space left on device; the rows in --out are complete." in done.stderr


@pytest.mark.release  # a process that answers
@pytest.mark.parametrize(
    ("redirections", "code"), [("| head -n 1", 0), (">/dev/full", 2), (">/dev/full 2>/dev/full", 2)]
)
def test_answers_without_a_folder(redirections: str, code: int, album: Path, small_folder: Path) -> None:
    done = shell(run_words(album, small_folder), redirections)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert (FULL in done.stderr) == (redirections == ">/dev/full")


def test_stdin_that_is_closed(small_folder: Path) -> None:
    done = shell(["run", "od", "-", "--model", small_folder], "<&-")
    assert done.returncode == 2 and done.stderr.endswith("but stdin is closed.\n") and len(done.stderr) < 200


@pytest.mark.parametrize(
    ("name", "redirections", "code"),
    [("run", ">/dev/full", 2), ("train", ">&-", 0), ("inspect", "| true", 0), ("init", "2>&-", 0)],
)
def test_help(name: str, redirections: str, code: int) -> None:
    done = shell([name, "--help"], redirections)
    assert done.returncode == code and done.stderr == (FULL if code else "")


@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full"])
def test_an_error_that_nobody_can_read_has_its_exit_code(redirections: str) -> None:
    assert shell(["info", "no/such/place"], redirections).returncode == 2
    assert shell(["fly"], redirections).returncode == 2


@pytest.mark.release
def test_a_file_does_not_get_the_number_of_a_closed_stream(album: Path, small_folder: Path, tmp_path: Path) -> None:
    """Or else all that a library prints would end up in it. The folder is complete all the same."""
    script = tmp_path / "noisy.py"
    script.write_text("import os\n\ndef prepare(model):\n    os.write(1, b'noise'), os.write(2, b'noise')\n")
    line = shlex.join(
        map(str, run_words(album, small_folder, "--out", tmp_path / "out", "--draw", "--prepare", "noisy:prepare"))
    )
    command = f"cd {tmp_path} && PYTHONPATH={Path.cwd()} {sys.executable} -m florence2 {line} >&- 2>&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert all(b"noise" not in file.read_bytes() for file in (tmp_path / "out").iterdir())
    rows = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(rows) == 4 and all("task" in json.loads(row) for row in rows)


# ---- signals -------------------------------------------------------------------------------------------------------


def start(words: list[object], *flags: str, ignored: bool = False) -> "subprocess.Popen[str]":
    def signals() -> None:  # a shell starts what runs in the background deaf to Ctrl-C, and tests may run there
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)

    command = [sys.executable, *flags, "-m", "florence2", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=signals, errors="replace"
    )


def frame(name: str, below: Any = None) -> Any:
    return SimpleNamespace(f_code=SimpleNamespace(co_filename=name), f_back=below)


def test_the_first_signal_interrupts_and_a_later_one_quits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One within a second is the same, which a launcher forwards."""
    stop, quits, now = object.__new__(program._Stop), [], [100.0]
    stop._first = None
    monkeypatch.setattr(program, "_quit", lambda: quits.append(now[0]))
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, frame("mine.py", frame("main.py")))
    for now[0] in (100.5, 101.0, 102.0):
        stop._handle(signal.SIGINT, frame("mine.py"))
    assert quits == [101.0, 102.0]


def test_a_signal_within_an_import_quits(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, quits = object.__new__(program._Stop), []
    stop._first = None
    monkeypatch.setattr(program, "_quit", lambda: quits.append(1))
    stop._handle(signal.SIGTERM, frame("torch/__init__.py", frame("<frozen importlib._bootstrap>", frame("main.py"))))
    assert quits == [1]
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGTERM, None)


@pytest.mark.parametrize(
    ("module", "number"),
    keep(
        [0, 3],
        [
            ("argparse", signal.SIGINT),
            ("numpy", signal.SIGINT),
            ("torch._C", signal.SIGINT),
            ("torch.nn", signal.SIGTERM),
            ("florence2.pipeline", signal.SIGINT),
        ],
    ),
)
def test_a_signal_during_imports(
    module: str, number: signal.Signals, album: Path, small_folder: Path, tmp_path: Path
) -> None:
    """As soon as a module has been imported; -X importtime names each as it is done."""
    words = run_words(album, small_folder, "--out", tmp_path / "out")
    with start(words, "-X", "importtime") as process:
        assert any(line.rpartition("|")[2].strip() == module for line in process.stderr)
        process.send_signal(number)
        errors = process.stderr.read()
        assert process.wait(60) == 130
    assert "Traceback" not in errors and "Exception ignored" not in errors and errors.count("florence2: stopped") == 1


@pytest.mark.release
def test_a_signal_that_is_ignored_stays_so(album: Path, small_folder: Path) -> None:
    with start(run_words(album, small_folder), "-X", "importtime", ignored=True) as process:
        assert any(line.rpartition("|")[2].strip() == "argparse" for line in process.stderr)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and output.count("== ") == 4


@pytest.mark.release
def test_ctrl_c_during_a_run_keeps_its_rows(small_folder: Path, tmp_path: Path) -> None:
    album, results = tmp_path / "album", tmp_path / "out" / "results.jsonl"
    album.mkdir()
    for i in range(150):
        make_picture(i, 40, 30).save(album / f"{i:03}.png")
    words = ["run", "od", album, "--model", small_folder, "--max-new-tokens", 60, "--out", results.parent]
    with start(words) as process:
        deadline = time.monotonic() + 100
        while not (results.exists() and results.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"images; the rows written so far are kept in {results.parent}." in errors
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert 3 <= len(rows) < 150 and not list(results.parent.glob(".results*"))
