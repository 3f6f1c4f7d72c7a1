"""Nine synthetic scenes in the official layouts of all tables, written once."""

from pathlib import Path

import pytest

from recipes.nano.write_tables import write_tables

SCENES, SEED = 9, 30


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data; tests that spoil a file copy it first."""
    folder = tmp_path_factory.mktemp("data")
    write_tables(folder, SEED, SCENES)
    return folder
