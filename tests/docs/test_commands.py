"""The commands of README and docs, run as they stand there, with nano in place of base."""

import io
import re
import shlex
from pathlib import Path

import pytest

from florence2.checkpoints import hub
from florence2.cli.main import main
from tests.docs.test_pages import PAGES, ROOT, blocks, name_of

ELSEWHERE = {
    "calibrate": "tests/train/test_calibrate.py",
    "dataset": "tests/dataset/test_guide.py",
    "download": "tests/checkpoints/test_hub.py",
    "evaluate": "tests/evaluate/test_command.py",
    "export": "tests/export/test_exporting.py",
    "label": "tests/dataset/test_guide.py",
    "mcp": "tests/mcp/test_tools.py",
    "serve": "tests/serve/test_process.py",
    "train": "tests/train/test_command.py",
}
"""Commands that need data, minutes or another program: what runs them."""
TUTORIAL = "docs/fine-tuning.md"
"""tests/train/test_fine_tuning.py runs its commands, with less data."""
LINES = [
    pytest.param(re.split(r"\s#\s", line)[0].strip(), id=f"{name_of(page)}: {line[:60].strip()}")
    for page in PAGES
    if name_of(page) != TUTORIAL
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.startswith("florence2 ") and line.split()[1] not in ELSEWHERE
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the files of the guides exist, and where base is nano."""
    nano = hub.resolve("nano")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "photo.jpg").symlink_to(ROOT / "docs" / "coffee.jpg")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "1.jpg").symlink_to(ROOT / "docs" / "coffee.jpg")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to(nano)
    find = hub._find_local
    known = ("base", "base-ft", "OWNER/NAME")
    monkeypatch.setattr(hub, "_find_local", lambda name, *rest: nano if name in known else find(name, *rest))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.release
@pytest.mark.parametrize("line", LINES)
def test_it_runs(line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line, _, stdin = line.partition(" < ")
    if stdin:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((place / stdin).read_bytes())))
    assert main(shlex.split(line)[1:]) == 0
    written = {path for path in place.iterdir() if path.name not in ("docs", "photo.jpg", "holiday", "run")}
    assert capsys.readouterr().out or written


def test_what_is_run_elsewhere() -> None:
    assert [path for path in ELSEWHERE.values() if not (ROOT / path).is_file()] == []
