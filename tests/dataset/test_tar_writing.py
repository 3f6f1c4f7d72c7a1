"""Tars have the bytes that Python's own `tarfile` writes, for every kind of name."""

import io
import tarfile
from pathlib import Path

import pytest

from florence2.dataset.tar_writing import TarWriter

NAMES = ["a.json", "a/b-2.json", "x" * 100, "x" * 101, f"{'d' * 90}/{'x' * 90}", "ä.txt", "a\udcff.txt"]


@pytest.mark.parametrize("sizes", [[0, 1, 511, 512, 513, 10_240, 0], [3] * 7, [100_000] * 7])
def test_the_bytes_are_those_of_tarfile(tmp_path: Path, sizes: list[int]) -> None:
    with tarfile.open(tmp_path / "expected.tar", "w", encoding="utf-8") as expected:
        for name, size in zip(NAMES, sizes, strict=True):
            info = tarfile.TarInfo(name)
            info.size, info.mode = size, 0o644
            expected.format = tarfile.USTAR_FORMAT if name.isascii() and len(name) <= 100 else tarfile.PAX_FORMAT
            expected.addfile(info, io.BytesIO(b"z" * size))
    written = TarWriter(tmp_path / "below" / "written.tar")
    for name, size in zip(NAMES, sizes, strict=True):
        written.add(name, b"z" * size)
    written.finish()
    assert (tmp_path / "below" / "written.tar").read_bytes() == (tmp_path / "expected.tar").read_bytes()
