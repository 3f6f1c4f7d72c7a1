"""nano as graphs, exported once, and the same as a published folder has them."""

import shutil
from pathlib import Path

import pytest

import florence2
from florence2.cli.main import main
from florence2.lite import Florence2Lite, load
from florence2.lite.layout import CROSS, STEP, graph_file
from parity.specimen import SCENES_SEED
from recipes.nano.exam import Exam


@pytest.fixture(scope="session")
def nano() -> florence2.Florence2:
    return florence2.load("nano", device="cpu")


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `florence2 export` writes of nano. Do not write to it."""
    folder = tmp_path_factory.mktemp("graphs") / "nano"
    assert main(["export", "nano", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def lite(nano_folder: Path) -> Florence2Lite:
    return load(nano_folder, threads=1)


@pytest.fixture(scope="session")
def published(nano_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without the graphs that published folders do not have."""
    folder = tmp_path_factory.mktemp("published") / "nano"
    shutil.copytree(nano_folder, folder)
    for graph in (STEP, CROSS):
        (folder / graph_file(graph)).unlink()
    return folder


@pytest.fixture(scope="session")
def scenes() -> Exam:
    """Scenes with questions of all tasks."""
    return Exam(SCENES_SEED, 16)
