"""The graph of the image preprocessing against Pillow."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from florence2 import Florence2
from florence2.export.graphs.pixels import preprocessing_graph
from florence2.inputs.image import ImageConfig, image_to_array, normalised_values, open_image
from florence2.lite.layout import PREPROCESS, graph_file

DOCS = Path(__file__).parents[3] / "docs"
CONFIG = ImageConfig(192, 192, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def run(graph: bytes | str, image: Image.Image) -> np.ndarray:
    values: np.ndarray = onnxruntime.InferenceSession(graph).run(None, {"pixels": np.asarray(image)})[0]
    return values


def steps(values: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Pixel values as the 8-bit values that they stand for."""
    table = normalised_values(config)
    return np.stack([np.searchsorted(table[channel], values[0, channel]) for channel in range(3)])


@pytest.mark.parametrize("size", [(192, 192), (224, 160), pytest.param((768, 768), marks=pytest.mark.release)])
@pytest.mark.parametrize("name", ["coffee.jpg", "drawing.jpg", "scene.png", "nano_answers.png"])
def test_it_is_within_one_step_of_pillow(name: str, size: tuple[int, int]) -> None:
    config = replace(CONFIG, height=size[0], width=size[1])
    image = open_image(DOCS / name)
    graph = preprocessing_graph(config)
    assert graph is not None
    values = run(graph.SerializeToString(), image)
    assert values.shape == (1, 3, *size) and values.dtype == np.float32
    difference = np.abs(steps(values, config) - steps(image_to_array(image, config), config))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.0002


def test_values_that_are_not_resized_are_exact(exported: Path, nano: Florence2) -> None:
    values = np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    result = run(str(exported / graph_file(PREPROCESS)), image)
    np.testing.assert_array_equal(result, image_to_array(image, nano.processor.image_config))


def test_onnx_lacks_some_filters() -> None:
    assert preprocessing_graph(replace(CONFIG, resample=Image.Resampling.LANCZOS)) is None
    assert preprocessing_graph(replace(CONFIG, resample=Image.Resampling.BILINEAR)) is not None
