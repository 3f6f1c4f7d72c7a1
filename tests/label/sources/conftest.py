"""Small images as bytes, and tars made of them."""

import io
import tarfile
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pytest

from parity.recipe import make_picture

T = TypeVar("T")
PackTar = Callable[..., Path]


def measured(work: Callable[[], T]) -> tuple[T, int]:
    """Return what a function returns, and the most bytes that Python's objects took meanwhile."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def png() -> Callable[[int], bytes]:
    """Encode a small image that a number determines."""

    def encode(number: int) -> bytes:
        buffer = io.BytesIO()
        make_picture(number, 6 + number, 5).save(buffer, format="PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def pack(tmp_path: Path) -> PackTar:
    """Write a tar with `tarfile` from names and their contents: bytes, or a whole TarInfo."""

    def pack(name: str, members: Mapping[str, bytes] | list[tuple[str, bytes | tarfile.TarInfo]], **options) -> Path:
        with tarfile.open(tmp_path / name, "w", **options) as tar:
            for member, data in members.items() if isinstance(members, Mapping) else members:
                if isinstance(data, tarfile.TarInfo):
                    tar.addfile(data)
                    continue
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return tmp_path / name

    return pack
