"""What `--out` may name."""

import os
import socket
from pathlib import Path

import pytest

from florence2.errors import OptionError
from florence2.inspect.out_file import check_out, write_out


def test_a_new_file_and_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "ü.html"
    check_out(path, overwrite=False)
    write_out(path, "ü\r\n")
    assert path.read_bytes() == "ü\r\n".encode() and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OptionError, match="exists; choose another name, or add --overwrite"):
        check_out(path, overwrite=False)
    check_out(path, overwrite=True)


def test_what_is_no_file_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device, a pipe, a socket: renaming a file over it would take it away from everybody."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        for path in (Path(os.devnull), tmp_path / "pipe", Path("socket")):
            with pytest.raises(OptionError, match="is a device or a pipe, which would be replaced"):
                check_out(path, overwrite=True)


def test_what_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"n\.html cannot be written: File name too long\. Choose another name"):
        check_out(tmp_path / f"{'n' * 300}.html", overwrite=False)
    with pytest.raises(OptionError, match=r"a\.html cannot be written: No such file or directory"):
        write_out(tmp_path / "no" / "a.html", "")
    with pytest.raises(OptionError, match="The folder .*no for a.html does not exist; create it first"):
        check_out(tmp_path / "no" / "a.html", overwrite=False)
    with pytest.raises(OptionError, match="is a folder; --out needs a file"):
        check_out(tmp_path, overwrite=True)
