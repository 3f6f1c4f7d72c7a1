"""Detection: COCO's instances."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.errors import shown
from florence2.evaluate.metrics.masks import check_counts
from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.evaluate.tables.reading import by_id, check, describe, entry, image_path, numbers, objects, read_json

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
    categories = _read_categories(values.get("categories"), f"{file}: categories")
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
        number = entry(value, "id", int, place)
        if number in image.objects:
            raise TableError(
                f"{place}.id is {number}, the id of an earlier object of its image too; ids must not repeat."
            )
        image.objects[number] = _read_instance(value, known, image, place)
    return InstanceFile(images, names)


def _read_categories(values: Any, where: str) -> dict[str, int]:
    categories: dict[str, int] = {}
    for number, value in by_id(values, where).items():
        name = entry(value, "name", str, f"{where}: {number}").casefold()
        if name in categories:
            raise TableError(f"{where} holds {shown(name)} twice; names must not repeat.")
        categories[name] = number
    return categories


def _read_instance(value: Mapping[str, Any], categories: Collection[int], image: Instances, place: str) -> Instance:
    category = entry(value, "category_id", int, place)
    if category not in categories:
        raise TableError(f"{place}.category_id is {category}, which none of the categories has.")
    left, top, width, height = numbers(value.get("bbox"), f"{place}.bbox", 4)
    area = check(value.get("area", width * height), float, f"{place}.area")
    if min(width, height, area) < 0:
        raise TableError(f"{place} has a side or an area below 0.")
    crowd = value.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise TableError(f"{place}.iscrowd must be 0 or 1, not {describe(crowd)}.")
    return Instance(category, (left, top, width, height), area, bool(crowd), _read_outline(value, image, place))


def _read_outline(
    value: Mapping[str, Any], image: Instances, place: str
) -> list[list[float]] | Mapping[str, Any] | None:
    outline, where = value.get("segmentation"), f"{place}.segmentation"
    if isinstance(outline, dict):
        numbers(outline.get("size"), f"{where}.size", 2)
        if not isinstance(outline.get("counts"), str):
            for i, count in enumerate(entry(outline, "counts", list, where)):
                check(count, int, f"{where}.counts[{i}]")
        try:
            check_counts(outline["counts"], image.width, image.height)
        except ValueError as error:
            raise TableError(f"{where}.counts cannot be used: {error}") from None
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
    if all(instance.is_crowd for instances in read.images.values() for instance in instances.objects.values()):
        raise TableError(
            f"{file} holds no objects but crowds; a file of images alone, as for test splits, has no truth."
        )
    for number, instances in read.images.items():
        path = image_path(images, read.names[number], f"{file}: image {number}.file_name")
        yield BenchmarkExample(str(number), path, None, instances)
