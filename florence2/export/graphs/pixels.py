"""The image preprocessing as a graph: 8-bit RGB values of any size -> pixel values.

Resizing 8-bit values, ONNX's antialiased filters compute as Pillow does, up to one step of 255 in a few values of a
hundred thousand. Resizing floats would differ by up to 14 steps.
"""

from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

from florence2.inputs.image import ImageConfig, normalised_values

_OPSET = 18  # the first with an antialiased Resize
_FILTERS: dict[int, dict[str, Any]] = {
    Image.Resampling.BILINEAR: {"mode": "linear"},
    Image.Resampling.BICUBIC: {"mode": "cubic", "cubic_coeff_a": -0.5},
}
"""Pillow's filters that ONNX has too."""


def preprocessing_graph(config: ImageConfig) -> ModelProto | None:
    """Return uint8 `pixels` [height, width, 3] -> `pixel_values` [1, 3, H, W]; None for a filter that ONNX lacks."""
    resampling = _FILTERS.get(config.resample)
    if resampling is None:
        return None
    size = [1, 3, config.height, config.width]
    constants: dict[str, np.ndarray] = {
        "batch": np.array([0], np.int64),
        "size": np.array(size, np.int64),
        "channel": np.array([0, 256, 512], np.int32).reshape(1, 3, 1, 1),
        # every 8-bit value has one result per channel, computed as the package does
        "values": normalised_values(config).astype(np.float32).reshape(-1),
    }
    nodes = [
        helper.make_node("Transpose", ["pixels"], ["channels_first"], perm=[2, 0, 1]),
        helper.make_node("Unsqueeze", ["channels_first", "batch"], ["image"]),
        helper.make_node(
            "Resize", ["image", "", "", "size"], ["resized"], antialias=1, exclude_outside=1, **resampling
        ),
        helper.make_node("Cast", ["resized"], ["number"], to=TensorProto.INT32),
        helper.make_node("Add", ["number", "channel"], ["place"]),
        helper.make_node("Gather", ["values", "place"], ["pixel_values"]),
    ]
    graph = helper.make_graph(
        nodes,
        "preprocess",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["height", "width", 3])],
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, size)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
