"""How weights are stored: as float16 where that loses nothing, as int8, or as bytes of another graph's file."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

SMALL = 1024  # bytes; a smaller tensor is not worth a reference to another file


def halve(model: ModelProto) -> None:
    """Store every float32 weight that float16 holds exactly as float16, with a cast that a runtime computes once.

    The casts stand in the outer graph: within a branch, a runtime would keep one copy for each. Of a graph that does
    nothing but take rows of a table, the rows are cast, so that no float32 copy of the table exists.
    """
    graph, casts, after = model.graph, list[NodeProto](), list[NodeProto]()
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}/float16"))
        if (rows := _sole_gather(model, name)) is not None:
            rows.input[0], found = tensor.name, rows.output[0]
            rows.output[0] = f"{found}/float16"
            after.append(helper.make_node("Cast", [rows.output[0]], [found], f"{found}/Cast", to=TensorProto.FLOAT))
            continue
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def _sole_gather(model: ModelProto, table: str) -> NodeProto | None:
    """Return the node of a graph that has no other, if that takes rows of `table`."""
    nodes = model.graph.node
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == "Gather" and nodes[0].input[0] == table else None


def share_weights(model: ModelProto, holder: Path) -> int:
    """Let the weights of `model` be bytes of `holder`, the file of another graph in the same folder.

    Returns how many bytes of weights were not found there and stay in `model`.
    """
    places = weight_places(holder)
    kept = 0
    for tensor in model.graph.initializer:
        place = places.get(tensor.raw_data)
        if place is None:
            kept += len(tensor.raw_data)
            continue
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", holder.name), ("offset", place), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return kept


def weight_places(file: Path) -> dict[bytes, int]:
    """Return where in the file of a graph its weights lie, by their bytes."""
    content = file.read_bytes()
    model = ModelProto.FromString(content)
    places, end = {}, 0
    for data in _weights(model):
        # in the order of the file, so the search begins where the last one ended
        end = content.index(data, end)
        places[data] = end
        end += len(data)
    return places


def _weights(model: ModelProto) -> Iterator[bytes]:
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= SMALL:
            yield tensor.raw_data


def quantise(model: ModelProto) -> ModelProto:
    """Return a graph whose products with weights are computed in 8 bits, with a scale for each output channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # it would advise, as a log message, to fold constants first, which tracing has done
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.onnx"
        quantize_dynamic(model, file, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(file)
