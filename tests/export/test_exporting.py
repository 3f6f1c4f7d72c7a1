"""The folder of an export: its files and names, what refuses to be written, and the proof."""

import copy
import json
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import florence2
from florence2 import Florence2
from florence2.cli.main import main
from florence2.errors import CheckpointError, Florence2Error, OptionError
from florence2.export import agreement, exporting
from florence2.export.agreement import prove_answers
from florence2.export.exporting import export_onnx
from florence2.export.prove import TOLERANCE, CachedDecoder, GraphFile, ProofError, prove_graphs
from florence2.lite.layout import EMBED, ENCODER, FIRST, MERGED, STEP, VISION, graph_file
from tests.export.conftest import read

LINEAR = "language_model.encoder.layers.0.fc1"
GOLDEN = Path(__file__).with_name("names.json")
"""Inputs, outputs and dimensions of nano's graphs: clients find them by these names."""
SIDECARS = {
    *("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("export.json", "confidence.json", "onnx"),
}


def ends(folder: Path) -> dict[str, dict[str, dict[str, list[str | int]]]]:
    graphs = {file.name: onnx.load(file, load_external_data=False).graph for file in (folder / "onnx").iterdir()}
    return {
        name: {
            side: {
                value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
                for value in getattr(graph, side)
            }
            for side in ("input", "output")
        }
        for name, graph in sorted(graphs.items())
    }


def test_the_names_are_those_of_the_layout(exported: Path) -> None:
    assert ends(exported) == json.loads(GOLDEN.read_text())
    assert {file.name for file in exported.iterdir()} == SIDECARS


def test_every_graph_is_valid(exported: Path) -> None:
    for file in (exported / "onnx").iterdir():
        onnx.checker.check_model(file, full_check=True)


def test_the_folder_is_about_as_large_as_the_checkpoint(exported: Path) -> None:
    checkpoint = Path("weights/nano/model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in (exported / "onnx").iterdir()) < 1.01 * checkpoint + (1 << 20)


def test_casts_of_weights_stand_in_the_outer_graph_alone(exported: Path) -> None:
    graph = read(exported, MERGED).graph
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    assert {node.input[0] for node in graph.node if node.op_type == "Cast"} >= stored
    branches = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    assert len(branches) == 2 * 3
    for branch in branches:
        assert not branch.initializer
        assert not [node for node in branch.node if stored & {*node.input}]


def test_large_weights_are_stored_once_and_as_float16(exported: Path) -> None:
    large = [tensor for tensor in read(exported, MERGED).graph.initializer if len(tensor.raw_data) > 1024]
    assert {tensor.data_type for tensor in large} == {TensorProto.FLOAT16}
    assert len({tensor.raw_data for tensor in large}) == len(large)
    for graph in (STEP, FIRST):
        assert (exported / graph_file(graph)).stat().st_size < 200_000


def test_the_export_says_where_it_comes_from(exported: Path, nano: Florence2, tmp_path: Path) -> None:
    values = json.loads((exported / "export.json").read_text())
    assert values["weights"] == {"storage": "float16", "rounded_values": 0}
    assert values["answers"] == {"compared": 4, "same_tokens": 4}
    assert all(0 <= difference < TOLERANCE / 10 for difference in values["differences"].values())
    assert {VISION, EMBED, ENCODER, MERGED, FIRST, "cross_kv"} == values["differences"].keys()


def test_a_folder_that_was_moved_still_answers(exported: Path, nano: Florence2, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "elsewhere")
    assert str(prove_answers(tmp_path / "elsewhere", nano, rounded=False)).startswith("4 of 4")


@pytest.mark.parametrize("graph", [VISION, ENCODER, MERGED, EMBED])
def test_a_changed_weight_fails_the_proof(exported: Path, nano: Florence2, tmp_path: Path, graph: str) -> None:
    """Change one number of one matrix by a hundredth."""
    folder = tmp_path / "changed"
    shutil.copytree(exported, folder)
    model = read(folder, graph)
    matrix = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 100][-1]
    values = numpy_helper.to_array(matrix).copy()
    values[7, 11] += 0.01
    matrix.CopyFrom(numpy_helper.from_array(values, matrix.name))
    (folder / graph_file(graph)).write_bytes(model.SerializeToString())
    with pytest.raises(ProofError, match=f"The exported graph {graph} differs from the model by"):
        prove_graphs(folder, nano.model, 192, 192)


def test_other_sizes_and_padded_batches_agree_closely(exported: Path, nano: Florence2) -> None:
    assert max(prove_graphs(exported, nano.model, 100, 190).values()) < TOLERANCE / 10


def test_exchanged_sequences_of_a_memory_fail_the_proof(
    exported: Path, nano: Florence2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers share a memory; equal ones would hide it."""
    call = GraphFile.__call__

    def exchanged(self: GraphFile, **feeds: Any) -> dict[str, np.ndarray]:
        out = call(self, **feeds)
        if self.name == STEP:
            out["logits"] = out["logits"][np.arange(len(out["logits"])) ^ 1]
        return out

    monkeypatch.setattr(GraphFile, "__call__", exchanged)
    with pytest.raises(ProofError, match="The exported graph cross_kv differs from the model by"):
        prove_graphs(exported, nano.model, 192, 192)


def test_other_answers_fail_the_proof(exported: Path, nano: Florence2) -> None:
    """A model that is not the exported one."""
    other = Florence2(copy.deepcopy(nano.model), nano.processor)
    with torch.no_grad():
        other.model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    words = "answers <CAPTION> by greedy search with other tokens: its weights are rounded to float16; export with"
    with pytest.raises(ProofError, match=words):
        prove_answers(exported, other, rounded=True)


def test_a_graph_that_does_not_run_fails_the_proof(exported: Path, nano: Florence2, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(exported, folder)
    (folder / graph_file(VISION)).write_bytes(b"not a graph")
    with pytest.raises(ProofError, match="onnxruntime cannot run the exported graph vision_encoder: .* Nothing was"):
        prove_graphs(folder, nano.model, 192, 192)


def test_beams_share_the_keys_and_values_of_one_memory(exported: Path, nano: Florence2) -> None:
    """Three sequences over one memory, as the uncached decoder reads them over three copies of it."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(1, 30, 160, generator=generator)
    ids = torch.randint(0, 1600, (3, 4), generator=generator)
    merged = GraphFile(exported, MERGED)
    source = {"encoder_attention_mask": torch.ones(1, 30, dtype=torch.long), "encoder_hidden_states": memory}
    decoder = CachedDecoder(merged, merged, None, nano.model, **source)
    with torch.inference_mode():
        embeddings = nano.model.language_model.shared(ids)
        expected = nano.model.decode(ids, memory.expand(3, -1, -1))
    decoder(embeddings[:1, :1])  # whose cache of one is repeated, as a search does
    cached = {name for name in decoder.feeds if ".decoder." in name}
    decoder.feeds |= {name: np.repeat(decoder.feeds[name], 3, axis=0)[:, :, :0] for name in cached}
    logits = np.concatenate([decoder(embeddings[:, at : at + 1]) for at in range(4)], axis=1)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


# ---- refused --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    small_folder: Path, small: Florence2, nano: Florence2, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "out"
    with pytest.raises(OptionError, match='needs a plain model in float32 on the CPU: load.*attention="eager"'):
        export_onnx(small, folder)
    with pytest.raises(OptionError, match="weights is 'q4'; it must be one of float16, float32, int8"):
        export_onnx(nano, folder, "q4")  # type: ignore[arg-type]
    part = florence2.load(small_folder, attention="eager", parts="vision")
    with pytest.raises(Florence2Error, match="The language model is missing"):
        export_onnx(part, folder)
    own = florence2.load(small_folder, attention="eager")
    own.model.untie_answers()
    with pytest.raises(CheckpointError, match="a token embedding of their own, and the ONNX layout has one"):
        export_onnx(own, folder)
    hooked = florence2.load(small_folder, attention="eager")
    hooked.model.language_model.encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(CheckpointError, match="This model is not the one that its configuration would bring back"):
        export_onnx(hooked, folder)
    large = florence2.load(small_folder, attention="eager")
    large.model.vision_tower.convs[0].conv.bias.data.fill_(1e5)
    with pytest.raises(CheckpointError, match=r"convs.0.conv.bias has values that float16 cannot hold.*float32"):
        export_onnx(large, folder)
    assert list(tmp_path.iterdir()) == []


def test_values_that_float16_would_round_are_counted(small_folder: Path, tmp_path: Path) -> None:
    f = florence2.load(small_folder, attention="eager")
    with torch.no_grad():
        for parameter in f.model.parameters():
            parameter.copy_(parameter.half().float())
        f.model.multi_modal_projector.image_projection.weight[0, :2] += 1e-6
    before = copy.deepcopy(f.model.state_dict())
    stored, rounded = exporting.round_to_float16(f.model)
    assert 1 <= rounded <= 2 and stored is not f.model
    assert all(torch.equal(before[name], value) for name, value in f.model.state_dict().items())
    assert exporting.round_to_float16(stored) == (stored, 0)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.release
def test_ctrl_c_ends_the_command_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "florence2", "export", "nano", str(tmp_path / "out")]

    def heed_ctrl_c() -> None:  # which a job in the background of a script ignores, and what it starts too
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c) as process:
        assert process.stderr is not None
        while "tracing embed_tokens" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().endswith("florence2: stopped.\n")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_a_folder_that_holds_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("")
    assert main(["export", "nano", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"florence2: {tmp_path} is not empty; choose a new folder for the export.\n"
    assert main(["export", "nano", str(tmp_path / "mine.txt")]) == 2
    assert "mine.txt is not a folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.release
def test_the_command_merges_an_adapter_and_measures_8_bits(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.checkpoints.test_adapters import CANONICAL, adapter

    monkeypatch.setattr(agreement, "_LONGEST", 5)
    monkeypatch.setattr(exporting, "_INT8_IMAGES", 1)
    base = florence2.load(small_folder, attention="eager")
    lora = adapter(tmp_path / "lora", base.model, {CANONICAL[LINEAR]: LINEAR})
    checkpoint, out = tmp_path / "licensed", tmp_path / "out"
    shutil.copytree(small_folder, checkpoint)
    (checkpoint / "LICENSE").write_text("MIT")
    words = ["--adapter", str(lora), "--weights", "int8", "--task-kind", "VQA=text"]
    assert main(["export", str(checkpoint), str(out), *words]) == 0
    captured, values = capsys.readouterr(), json.loads((out / "export.json").read_text())
    assert captured.out == f"{out}\n"
    assert f"{values['answers']['same_tokens']} of 4 answers have the same tokens as the model's" in captured.err
    assert f"{values['weights']['rounded_values']:,} values are rounded to float16" in captured.err
    assert values["source"]["adapter_sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert TensorProto.INT8 in {tensor.data_type for tensor in read(out, VISION).graph.initializer}
    assert not (out / graph_file(FIRST)).exists()
    assert (out / "LICENSE").read_text() == "MIT"
    assert '"<VQA>"' in (out / "tasks.json").read_text()
    for folder, fits in ((lora, True), (None, False)):
        model = florence2.load(small_folder, adapter=folder, attention="eager").model if folder else base.model
        rounded, _ = exporting.round_to_float16(model)
        with nullcontext() if fits else pytest.raises(ProofError, match="graph encoder_model differs"):
            assert prove_graphs(out, rounded, 160, 224, exact=False)[VISION] > TOLERANCE


def test_float32_is_stored_as_it_is(nano: Florence2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "trace_part", lambda part: helper.make_model(table(part.outputs)))
    monkeypatch.setattr(exporting, "merge_decoders", lambda step, cross: step)
    for weights, kind in (("float32", TensorProto.FLOAT), ("float16", TensorProto.FLOAT16)):
        folder = tmp_path / weights
        folder.mkdir()
        exporting._write_graphs(folder, nano.model, (192, 192), weights, False, lambda _: None)
        for graph in (VISION, EMBED, ENCODER, MERGED, STEP):
            assert {tensor.data_type for tensor in read(folder, graph).graph.initializer} == {kind}, graph


def table(outputs: list[str]) -> onnx.GraphProto:
    """A graph that returns a weight."""
    weight = numpy_helper.from_array(np.ones((20, 40), np.float32), "weight")
    node = helper.make_node("Identity", ["weight"], outputs[:1])
    return helper.make_graph([node], "table", [], [helper.make_empty_tensor_value_info(outputs[0])], [weight])


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_sentence(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", "nano", str(tmp_path / "out")]) == 2
    assert (
        f'needs the package {package}, which is not installed; in a checkout of this project: pip install ".[export]"'
        in (capsys.readouterr().err)
    )
