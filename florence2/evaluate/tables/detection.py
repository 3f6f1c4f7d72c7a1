"""Detection: COCO's instances."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.errors import shown
from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.evaluate.tables.reading import by_id, check, entry, image_path, numbers, objects, read_json

MAX_PIXELS = 1 << 26
"""The largest image of a file; masks of its size are made."""


@dataclass(frozen=True)
class Instance:
    """One object: its category, its box (left, top, width, height in pixels), and its outlines or run lengths.

    `outline` is what the file holds: rings (x, y, x, y, ...), or the run lengths of a mask with its size.
    """

    category: int
    box: tuple[float, float, float, float]
    area: float
    is_crowd: bool
    outline: list[list[float]] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Instances:
    """The objects of one image, its size in pixels, and the ids of all categories of the file by their names."""

    image_id: int
    width: int
    height: int
    objects: dict[int, Instance]
    categories: Mapping[str, int]


@dataclass(frozen=True)
class InstanceFile:
    """A file of instances: the images by their ids, and their file names."""

    images: dict[int, Instances]
    names: dict[int, str]


def read_instance_file(file: Path) -> InstanceFile:
    """Read a file in COCO's form for instances."""
    values = check(read_json(file), dict, str(file))
    categories = {
        entry(value, "name", str, f"{file}: category {number}").casefold(): number
        for number, value in by_id(values.get("categories"), f"{file}: categories").items()
    }
    known = frozenset(categories.values())
    images, names = {}, {}
    for number, value in by_id(values.get("images"), f"{file}: images").items():
        place = f"{file}: image {number}"
        width, height = (entry(value, side, int, place) for side in ("width", "height"))
        if width < 1 or height < 1 or width * height > MAX_PIXELS:
            size = f"{shown(width, 30)} x {shown(height, 30)}"
            raise TableError(f"{place} has the size {size}; an image has 1 to {MAX_PIXELS:,} pixels.")
        images[number], names[number] = (
            Instances(number, width, height, {}, categories),
            entry(value, "file_name", str, place),
        )
    for place, value in objects(values.get("annotations"), f"{file}: annotations"):
        image = images.get(entry(value, "image_id", int, place))
        if image is None:
            raise TableError(f"{place}.image_id is {value['image_id']}, which none of the images has.")
        image.objects[entry(value, "id", int, place)] = _read_instance(value, known, place)
    return InstanceFile(images, names)


def _read_instance(value: Mapping[str, Any], categories: Collection[int], place: str) -> Instance:
    category = entry(value, "category_id", int, place)
    if category not in categories:
        raise TableError(f"{place}.category_id is {category}, which none of the categories has.")
    left, top, width, height = numbers(value.get("bbox"), f"{place}.bbox", 4)
    area = check(value.get("area", width * height), float, f"{place}.area")
    crowd = value.get("iscrowd", 0) not in (0, False)
    return Instance(category, (left, top, width, height), area, crowd, _read_outline(value, place))


def _read_outline(value: Mapping[str, Any], place: str) -> list[list[float]] | Mapping[str, Any] | None:
    outline, where = value.get("segmentation"), f"{place}.segmentation"
    if isinstance(outline, dict):
        numbers(outline.get("size"), f"{where}.size", 2)
        if not isinstance(outline.get("counts"), str):
            for i, count in enumerate(entry(outline, "counts", list, where)):
                check(count, int, f"{where}.counts[{i}]")
        return outline
    if outline is None:
        return None
    rings = [numbers(ring, f"{where}[{i}]") for i, ring in enumerate(check(outline, list, where))]
    if any(len(ring) % 2 for ring in rings):
        raise TableError(f"{where} has an outline with an odd number of coordinates.")
    return rings


def read_instances(file: Path, images: Path) -> Iterator[BenchmarkExample[Instances]]:
    """Yield the images of a file of instances, those without objects too."""
    read = read_instance_file(file)
    for number, instances in read.images.items():
        path = image_path(images, read.names[number], f"{file}: image {number}.file_name")
        yield BenchmarkExample(str(number), path, None, instances)
