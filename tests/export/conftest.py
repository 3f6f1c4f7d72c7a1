"""One export of nano, which the tests share, and its model."""

from pathlib import Path

import onnx
import pytest

import florence2
from florence2 import Florence2
from florence2.export.exporting import export_onnx
from florence2.lite.layout import graph_file


@pytest.fixture(scope="session")
def nano() -> Florence2:
    """Nano as it is exported. Do not change it."""
    return florence2.load("nano", device="cpu", attention="eager")


@pytest.fixture(scope="session")
def exported(nano: Florence2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano's folder, with the unmerged decoder. Do not write to it."""
    folder = tmp_path_factory.mktemp("exported") / "nano"
    export_onnx(nano, folder, unmerged=True)
    return folder


def read(folder: Path, graph: str) -> onnx.ModelProto:
    """A graph, whose external weights are left where they are."""
    return onnx.load(folder / graph_file(graph), load_external_data=False)
