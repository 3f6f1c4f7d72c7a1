"""Files written whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from florence2.files import write_json, written_whole


def test_half_written_files_never_appear(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    with pytest.raises(RuntimeError), written_whole(target) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with written_whole(target) as draft:
        draft.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"] and target.stat().st_mode & 0o600 == 0o600


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
