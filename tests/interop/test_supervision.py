"""Answers become `Detections` of supervision."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import florence2
from florence2.errors import OptionError

# without OpenCV supervision warns, at its first import, that it uses NumPy in its place
pytestmark = pytest.mark.filterwarnings("ignore:OpenCV")

DOCS = Path(florence2.__file__).parent.parent / "docs"
SCENE = DOCS / "scene.png"


@pytest.fixture(scope="module")
def f() -> florence2.Florence2:
    return florence2.load("nano", device="cpu")


def test_boxes(f: florence2.Florence2) -> None:
    answer = f.run("<OD>", SCENE)
    found: Any = answer.to_supervision()
    assert np.allclose(found.xyxy, [box.xyxy for box in answer.boxes])
    assert found.confidence.tolist() == pytest.approx([box.confidence for box in answer.boxes])
    assert found.data["class_name"].tolist() == [box.label for box in answer.boxes]
    names = sorted({box.label for box in answer.boxes})
    assert [names[i] for i in found.class_id] == [box.label for box in answer.boxes]
    assert len(found[found.confidence > 2]) == 0 and found.mask is None


def test_own_classes(f: florence2.Florence2) -> None:
    answer = f.run("<OD>", SCENE)
    found: Any = answer.to_supervision(["triangle", "word"])
    expected = {"triangle": 0, "word": 1}
    assert found.class_id.tolist() == [expected.get(box.label, -1) for box in answer.boxes]
    with pytest.raises(OptionError, match="give a list of labels"):
        answer.to_supervision("triangle")


def test_quads_and_masks(f: florence2.Florence2) -> None:
    quads: Any = f.run("<OCR_WITH_REGION>", SCENE).to_supervision()
    assert quads.data["xyxyxyxy"].shape == (len(quads), 4, 2) and len(quads) > 0
    answer = f.run("<REFERRING_EXPRESSION_SEGMENTATION>", SCENE, "a blue triangle")
    outlines: Any = answer.to_supervision()
    assert outlines.mask.shape == (1, answer.image_size[1], answer.image_size[0]) and outlines.mask.sum() > 1000
    x, y = np.array(answer.polygons[0].rings[0]).reshape(-1, 2).mean(axis=0)
    assert outlines.mask[0, int(y), int(x)]


def test_nothing(f: florence2.Florence2) -> None:
    answer: Any = f.processor.answer("<OD>", "", image_size=(10, 10)).to_supervision()
    assert len(answer) == 0


def test_the_block_of_the_guide(f: florence2.Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "confidence.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(DOCS.parent)
    monkeypatch.setattr(florence2, "load", lambda name: f)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/confidence.md", "exec"), names)
    kept = names["sure"].boxes
    assert all(box.confidence >= 0.5 for box in kept) and len(names["detections"]) >= len(kept)
