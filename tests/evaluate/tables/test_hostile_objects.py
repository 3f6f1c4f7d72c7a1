"""Hostile and damaged files of objects: one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from florence2.evaluate.tables.catalogue import read_table
from florence2.evaluate.tables.detection import read_instance_file, read_instances
from florence2.evaluate.tables.example import TableError
from tests.evaluate.tables.test_hostile import FILES, sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segmentation": [[1, 2, 3]]}, "segmentation has an outline with an odd number of coordinates."),
        ({"segmentation": [[1, 2, 3, 1e9]]}, "segmentation[0] has a number beyond 131,072 pixels."),
        (
            {"segmentation": {"size": [3, 3], "counts": ["x"]}},
            "segmentation.counts[0] must be a whole number, not 'x'.",
        ),
        ({"bbox": [1, 2, 3]}, "bbox must hold 4 numbers, not 3."),
        ({"category_id": 2}, "category_id is 2, which none of the categories has."),
        ({"image_id": 77}, "image_id is 77, which none of the images has."),
        ({"id": 101}, "annotations[1].id is 101, the id of an earlier object of its image too; ids must not repeat."),
        ({"id": 1 << 63}, "id is 9223372036854775808; whole numbers have at most 63 bits."),
        ({"bbox": [1, 2, -3, 4]}, "annotations[0] has a side or an area below 0."),
        ({"bbox": [1, 2, 3, -4], "area": 5}, "annotations[0] has a side or an area below 0."),
        ({"area": -1}, "annotations[0] has a side or an area below 0."),
        ({"iscrowd": []}, "iscrowd must be 0 or 1, not a list of 0."),
        ({"iscrowd": 2}, "iscrowd must be 0 or 1, not 2."),
        ({"segmentation": {"size": [3, 3], "counts": [9]}}, "must add up to 303 x 247 pixels."),
        ({"segmentation": {"size": [3, 3], "counts": "~"}}, "hold a letter that has no meaning there."),
    ],
)
def test_spoilt_instances(change: dict[str, Any], words: str, data: Path, tmp_path: Path) -> None:
    values = json.loads((data / FILES["coco-detection"]).read_text())
    values["annotations"][0] |= change
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(values))
    with pytest.raises(TableError) as error:
        read_instance_file(file)
    assert sentence(error).endswith(words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values["annotations"].clear(), "holds no objects but crowds"),
        (lambda values: [each.update(iscrowd=1) for each in values["annotations"]], "holds no objects but crowds"),
        (lambda values: values["categories"][1].update(name="Circle"), "categories holds 'circle' twice"),
        (lambda values: values["images"][0].update(width=0), "has the size 0 x 247"),
        (lambda values: values["images"][0].update(height=0), "has the size 303 x 0"),
        (lambda values: values["images"][0].update(file_name="a\nb.jpg"), "must be the name of an image"),
        (lambda values: values["images"][0].update(file_name="\udcff.jpg"), "must be the name of an image"),
        (lambda values: values["images"][0].update(file_name="a" * 201), "must be the name of an image"),
    ],
)
def test_spoilt_images_and_categories(change: Callable[[Any], None], words: str, data: Path, tmp_path: Path) -> None:
    values = json.loads((data / FILES["coco-detection"]).read_text())
    change(values)
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(values))
    with pytest.raises(TableError) as error:
        list(read_instances(file, tmp_path))
    assert words in sentence(error)


def test_a_crowd_is_written_as_a_number_or_not_at_all(data: Path, tmp_path: Path) -> None:
    values = json.loads((data / FILES["coco-detection"]).read_text())
    for annotation, crowd in zip(values["annotations"], (0, 1, False, True), strict=False):
        annotation["iscrowd"] = crowd
    del values["annotations"][4]["iscrowd"]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(values))
    objects = [each for image in read_instance_file(file).images.values() for each in image.objects.values()]
    assert [each.is_crowd for each in objects[:5]] == [False, True, False, True, False]


def test_an_object_without_a_segmentation(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "refcoco", tmp_path / "refcoco")
    (tmp_path / "coco").symlink_to(data / "coco")
    file = tmp_path / "refcoco" / "instances.json"
    values = json.loads(file.read_text())
    outlines: tuple[Any, ...] = (None, [], {})
    for outline in outlines:
        for annotation in values["annotations"]:
            annotation["segmentation"] = outline
        file.write_text(json.dumps(values))
        with pytest.raises(TableError) as error:
            read_table("refcoco-res:testA", tmp_path)
        assert outline == {} or "which has no segmentation in" in sentence(error)
    for annotation in values["annotations"]:
        annotation.pop("segmentation")
    file.write_text(json.dumps(values))
    assert read_table("refcoco:testA", tmp_path)  # whose metric needs none


def test_an_image_that_is_too_large(data: Path, tmp_path: Path) -> None:
    values = json.loads((data / FILES["coco-detection"]).read_text())
    values["images"][0] |= {"width": 1 << 14, "height": (1 << 12) + 1}
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(values))
    with pytest.raises(TableError, match="has the size 16384 x 4097; an image has 1 to 67,108,864 pixels"):
        read_instance_file(file)
