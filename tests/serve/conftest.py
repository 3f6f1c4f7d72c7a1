"""One server with nano for all tests that do not end it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import florence2
from tests.serve.server import RunningServer, png, serving


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="package")
def nano() -> florence2.Florence2:
    return florence2.load("nano", device="cpu")


@pytest.fixture(scope="package")
def image() -> bytes:
    return (Path(__file__).parents[2] / "docs" / "scene.png").read_bytes()


@pytest.fixture
def new_image() -> bytes:
    """An image that no other test has sent."""
    global _seed
    _seed += 1
    return png(_seed)


_seed = 1000
