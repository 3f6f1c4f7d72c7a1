"""One graph in onnxruntime: types, failures, what it returns. The graphs are made here."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from florence2.errors import CheckpointError, OptionError
from florence2.lite import sessions
from florence2.lite.sessions import Graph, check_threads, find_provider

CPU = "CPUExecutionProvider"


def make_graph(path: Path, kind: int, shape: list[int | str]) -> Path:
    """Write a graph that adds an input to itself."""
    value = helper.make_tensor_value_info("x", kind, shape)
    node = helper.make_node("Add", ["x", "x"], ["y"])
    graph = helper.make_graph([node], "twice", [value], [helper.make_tensor_value_info("y", kind, shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("kind", "name"), [(TensorProto.FLOAT, "float32"), (TensorProto.FLOAT16, "float16"), (TensorProto.INT64, "int64")]
)
def test_types(tmp_path: Path, kind: int, name: str) -> None:
    """Inputs are what the graph wants; outputs are never float16."""
    graph = Graph(make_graph(tmp_path / "g.onnx", kind, ["n"]), CPU, 1)
    assert graph.inputs == {"x": np.dtype(name).type}
    for given in (np.array([1.0, 2.0]), np.array([1, 2])):
        (found,) = graph(x=given)
        assert found.tolist() == [2, 4] and found.dtype == ("int64" if name == "int64" else "float32")


def test_outputs_by_name(tmp_path: Path) -> None:
    graph = Graph(make_graph(tmp_path / "g.onnx", TensorProto.FLOAT, ["n"]), CPU, None, returns_memory=True)
    assert [each.tolist() for each in graph(["y", "y"], x=np.ones(1))] == [[2.0], [2.0]]


def test_a_run_that_fails(tmp_path: Path) -> None:
    graph = Graph(make_graph(tmp_path / "g.onnx", TensorProto.FLOAT, [3]), CPU, 1)
    with pytest.raises(CheckpointError, match=r"^g\.onnx could not be run: "):
        graph(x=np.ones(4))


def test_a_provider_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime falls back to the CPU with a warning alone."""

    class Runtime:
        SessionOptions = sessions._runtime().SessionOptions

        @staticmethod
        def InferenceSession(*_: object) -> object:
            return type("Session", (), {"get_providers": lambda self: [CPU]})()

    monkeypatch.setattr(sessions, "_runtime", lambda: Runtime)
    path = make_graph(tmp_path / "g.onnx", TensorProto.FLOAT, ["n"])
    with pytest.raises(OptionError, match="could not start CUDAExecutionProvider; its libraries are missing"):
        sessions._open(path, "CUDAExecutionProvider", 1)


@pytest.mark.parametrize("name", ["cpu", "CPU", CPU])
def test_names_of_providers(name: str) -> None:
    assert find_provider(name) == CPU


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", 257, 10**6])
def test_wrong_threads(threads: object) -> None:
    with pytest.raises(OptionError, match="it must be a whole number from 1 to 256"):
        check_threads(threads)  # type: ignore[arg-type]
    assert check_threads(2) == check_threads(np.int64(2)) == 2 and check_threads(None) is None


def test_onnxruntime_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OptionError, match="needs the package onnxruntime, which is not installed: pip install"):
        find_provider("cpu")
