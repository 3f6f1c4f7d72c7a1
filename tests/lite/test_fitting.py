"""Folders whose files do not belong together are refused before anything is computed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from florence2.errors import CheckpointError, ConfigError, Florence2Error
from florence2.lite import load
from florence2.lite.layout import CONFIG, CROSS, EMBED, ENCODER, EXPORT, MERGED, STEP, VISION, graph_file
from tests.release import keep


@pytest.fixture(params=["nano_folder", "published"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that may be written to and that no longer says which files it had: ours, and as published ones are."""
    copy = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(request.param), copy)
    (copy / EXPORT).unlink()
    return copy


@pytest.mark.parametrize(
    ("graph", "other", "words"),
    keep(
        [0],
        [
            (VISION, EMBED, "it has no input pixel_values"),
            (EMBED, ENCODER, "it has no input input_ids"),
            (ENCODER, VISION, "it has no input attention_mask"),
        ],
    ),
)
def test_a_graph_in_the_place_of_another(folder: Path, graph: str, other: str, words: str) -> None:
    shutil.copyfile(folder / graph_file(other), folder / graph_file(graph))
    with pytest.raises(CheckpointError, match=rf"{graph}\.onnx is not the graph that config.json describes: {words}"):
        load(folder)


def test_a_decoder_in_the_place_of_another(nano_folder: Path, tmp_path: Path) -> None:
    for graph, other in ((STEP, CROSS), (CROSS, STEP)):
        folder = tmp_path / graph
        shutil.copytree(nano_folder, folder)
        (folder / EXPORT).unlink()
        shutil.copyfile(nano_folder / graph_file(other), folder / graph_file(graph))
        with pytest.raises(CheckpointError, match=rf"{graph}\.onnx is not the graph that config.json describes"):
            load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    keep(
        [0, 3],
        [
            ({"decoder_layers": 4}, r"it has no input past_key_values\.3\.decoder\.key"),
            ({"decoder_layers": 2}, r"it needs an input past_key_values\.2\.decoder\.key"),
            ({"decoder_attention_heads": 10}, r"has the shape \[any, 5, any, 32\], not \[any, 10, any, 16\]"),
            ({"vocab_size": 1630}, r"logits has the shape \[any, any, 1631\], not \[any, any, 1630\]"),
        ],
    ),
)
def test_settings_of_another_model(folder: Path, changes: dict[str, Any], words: str) -> None:
    values = json.loads((folder / CONFIG).read_text())
    values["text_config"] |= changes
    (folder / CONFIG).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize("graph", [VISION, MERGED])
def test_a_graph_that_the_export_did_not_write(nano_folder: Path, tmp_path: Path, graph: str) -> None:
    """One changed bit of a weight, which onnxruntime cannot see; two graphs read their weights in the merged one."""
    folder = tmp_path / "copy"
    shutil.copytree(nano_folder, folder)
    content = bytearray((folder / graph_file(graph)).read_bytes())
    content[len(content) // 2] ^= 64
    (folder / graph_file(graph)).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{graph}\.onnx has changed since the export .* delete export\.json"):
        load(folder)


@pytest.mark.parametrize(("text", "error"), [('{"files": []}', CheckpointError), ("[]", ConfigError)])
def test_a_damaged_list_of_files(nano_folder: Path, tmp_path: Path, text: str, error: type[Exception]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(nano_folder, folder)
    (folder / EXPORT).write_text(text)
    with pytest.raises(error, match="object"):
        load(folder)


def weights(model: ModelProto) -> Iterator[Any]:
    return (tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and len(tensor.raw_data) > 1000)


@pytest.mark.parametrize("beams", [1, 3])
def test_logits_that_are_not_finite(folder: Path, beams: int) -> None:
    """Greedy search would take NaN for the best id and answer, without a word."""
    model = onnx.load(folder / graph_file(MERGED))
    for tensor in weights(model):
        values = numpy_helper.to_array(tensor)
        tensor.raw_data = np.full_like(values, np.nan).tobytes()  # of the same length, so that offsets stay right
    (folder / graph_file(MERGED)).write_bytes(model.SerializeToString())
    with pytest.raises(Florence2Error, match="The decoder's logits are not finite"):
        load(folder, threads=1).run("<OD>", np.zeros((8, 8, 3), np.uint8), num_beams=beams)


def test_onnxruntime_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its errors are raised; it would also write them to stderr, in red."""
    model = onnx.load(folder / graph_file(VISION))
    tensor = next(weights(model))
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", f"{EMBED}.onnx"), ("offset", 1 << 40), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    (folder / graph_file(VISION)).write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"onnxruntime cannot read .*vision_encoder\.onnx"):
        load(folder)
    assert capfd.readouterr().err == ""
