"""The Python block and the command of docs/lite.md, run as they stand."""

import re
import shlex
from pathlib import Path

import pytest

from florence2.lite.command import main

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "docs" / "lite.md").read_text(encoding="utf-8")


@pytest.fixture
def place(nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the paths of the guide exist."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "nano").symlink_to(nano_folder)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "scene.png").write_bytes((ROOT / "docs" / "scene.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_block(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(block, {})
    assert "confidence" in capsys.readouterr().out


def test_the_command(place: Path) -> None:
    (line,) = (line for line in GUIDE.splitlines() if line.startswith("python -m florence2.lite"))
    words = shlex.split(line, comments=True)
    assert words[:3] == ["python", "-m", "florence2.lite"] and main(words[3:]) == 0
    assert len((place / "answers" / "results.jsonl").read_text().splitlines()) == 2
