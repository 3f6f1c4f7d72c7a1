"""Turn COCO files of detections or captions into questions.

For detections, `<OD>` asks for all boxes of an image, from left to right and, where level, from top to bottom: a model
can learn an order that depends on the image, but not the order in which annotators clicked. `<REGION_TO_CATEGORY>` and
`<REGION_TO_SEGMENTATION>` ask about every object by its box. Crowds (`iscrowd`) and images without annotations are
left out.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.errors import shown
from florence2.inputs.coordinates import box_to_tokens
from florence2.train.entries import (
    DataError,
    Entry,
    Problems,
    check_choice,
    read_answer,
    read_numbers,
    read_pixels,
    read_text,
)
from florence2.train.images import ImageFolder
from florence2.train.targets import Size, boxes_target, polygons_target

CAPTION_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")
DETECTION_TASKS = ("<OD>", "<REGION_TO_CATEGORY>", "<REGION_TO_SEGMENTATION>")


@dataclass(frozen=True)
class _Thing:
    """One annotated object: its box (x1, y1, x2, y2) in pixels, and its outlines in the form of the file."""

    place: str
    label: str
    box: tuple[float, ...]
    segmentation: object


def read_coco(path: Path, folder: ImageFolder, problems: Problems, tasks: Sequence[str] = ()) -> list[Entry]:
    """Read the questions of a COCO file, image by image in the order of "images".

    `problems` collects the faults, with the ids of the file. `tasks` come from DETECTION_TASKS (default `<OD>`), or
    from CAPTION_TASKS for a file of captions (default `<CAPTION>`). Raises DataError for a file that is neither.
    """
    values = _load(path)
    captions = any(isinstance(row, dict) and "caption" in row for row in values["annotations"][:1])
    allowed = CAPTION_TASKS if captions else DETECTION_TASKS
    check_choice("the task", tasks, allowed)
    tasks = tasks or allowed[:1]
    labels = {} if captions else _by_id(values, "categories", problems)
    images = _by_id(values, "images", problems)
    entries: list[Entry] = []
    for image_id, rows in _by_image(values["annotations"], images, problems).items():
        with problems.at(f"image {image_id}"):
            image = folder.find(read_text(images[image_id], "file_name"))
            if captions:
                entries += _captions(image, rows, tasks, problems)
            else:
                size = _size_of(image, images[image_id], folder)
                things = list(_things(rows, labels, size, problems))
                entries += [entry for task in tasks for entry in _QUESTIONS[task](image, things, size, problems)]
    return entries


def _load(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from None
    for key in ("images", "annotations"):
        if not isinstance(values, dict) or not isinstance(values.get(key), list):
            raise DataError(
                f"{path} is not a COCO file: it has no list of {key}. The name of a JSON Lines file must end in .jsonl."
            )
    checked: dict[str, Any] = values
    return checked


def _by_id(values: dict[str, Any], key: str, problems: Problems) -> dict[int, dict[str, Any]]:
    """Index the objects of a list by their ids."""
    objects: dict[int, dict[str, Any]] = {}
    rows = values.get(key)
    for index, row in enumerate(rows if isinstance(rows, list) else ()):
        with problems.at(f"{key}[{index}]"):
            if not isinstance(row, dict) or type(row.get("id")) is not int:
                raise DataError(f"must be an object with an integer id, not {shown(row)}.")
            if row["id"] in objects:
                raise DataError(f"the id {row['id']} is used twice; give each object its own.")
            objects[row["id"]] = row
    return objects


_Rows = list[tuple[str, dict[str, Any]]]


def _by_image(annotations: list[Any], images: dict[int, dict[str, Any]], problems: Problems) -> dict[int, _Rows]:
    """Group (place, annotation) rows by image, without crowds and without images that have none."""
    grouped: dict[int, _Rows] = {image_id: [] for image_id in images}
    for index, row in enumerate(annotations):
        place = f"annotation {row['id']}" if isinstance(row, dict) and "id" in row else f"annotations[{index}]"
        with problems.at(place):
            if not isinstance(row, dict) or type(row.get("image_id")) is not int or row["image_id"] not in grouped:
                raise DataError(f"{shown(row)} belongs to no image; image_id must be the id of one in images.")
            if not row.get("iscrowd"):
                grouped[row["image_id"]].append((place, row))
    return {image_id: rows for image_id, rows in grouped.items() if rows}


def _captions(image: Path, rows: _Rows, tasks: Sequence[str], problems: Problems) -> Iterator[Entry]:
    for task in tasks:
        for place, row in rows:
            with problems.at(place):
                yield Entry(image, place, task, read_answer(row, "caption").strip())


def _size_of(path: Path, image: dict[str, Any], folder: ImageFolder) -> Size:
    """Return the size of the image file, which must be the size that its boxes were drawn on."""
    size = folder.size(path)
    listed = (image.get("width", size[0]), image.get("height", size[1]))
    if listed != size:
        raise DataError(
            f"{path.name} is {size[0]} x {size[1]} pixels upright, but the file says {listed[0]} x {listed[1]}: boxes "
            "drawn at another size or before EXIF rotation would be off. Correct the image or the file."
        )
    return size


def _things(rows: _Rows, labels: dict[int, dict[str, Any]], image_size: Size, problems: Problems) -> Iterator[_Thing]:
    for place, row in rows:
        with problems.at(place):
            category = labels.get(row["category_id"]) if type(row.get("category_id")) is int else None
            if category is None:
                raise DataError(f"category_id is {shown(row.get('category_id'))}, which is not in categories.")
            label = read_text(category, "name").strip()
            if not label:
                raise DataError(f"the name of category {row['category_id']} is empty; give it one.")
            yield _Thing(place, label, _corners(row.get("bbox"), image_size), row.get("segmentation"))


def _corners(bbox: object, image_size: Size) -> tuple[float, ...]:
    numbers = read_numbers(bbox)
    if len(numbers) != 4 or numbers[2] < 0 or numbers[3] < 0:
        raise DataError(f"bbox is {shown(bbox)}; it must be left, top, width, height in pixels.")
    left, top, width, height = numbers
    return tuple(read_pixels([left, top, left + width, top + height], image_size))


_Questions = Callable[[Path, Sequence[_Thing], Size, Problems], Iterator[Entry]]


def _detection(image: Path, things: Sequence[_Thing], image_size: Size, problems: Problems) -> Iterator[Entry]:
    if things:
        place = things[0].place + (f" and {len(things) - 1} more" if len(things) > 1 else "")
        with problems.at(place):
            rows = [(thing.label, thing.box) for thing in sorted(things, key=lambda thing: thing.box[:2])]
            yield Entry(image, place, "<OD>", boxes_target(rows, image_size))


def _regions(task: str, answer: Callable[[_Thing, Size], str]) -> _Questions:
    """Make the function that asks about each object by its box."""

    def ask(image: Path, things: Sequence[_Thing], image_size: Size, problems: Problems) -> Iterator[Entry]:
        for thing in things:
            with problems.at(thing.place):
                prefix = task + box_to_tokens(thing.box, image_size)
                yield Entry(image, thing.place, prefix, answer(thing, image_size))

    return ask


def _outlines(thing: _Thing, image_size: Size) -> str:
    if not isinstance(thing.segmentation, list) or not thing.segmentation:
        raise DataError(f"segmentation is {shown(thing.segmentation)}; it must be a list of polygons in pixels.")
    return polygons_target([read_pixels(ring, image_size) for ring in thing.segmentation], image_size)


_QUESTIONS: dict[str, _Questions] = {
    "<OD>": _detection,
    "<REGION_TO_CATEGORY>": _regions("<REGION_TO_CATEGORY>", lambda thing, _: thing.label),
    "<REGION_TO_SEGMENTATION>": _regions("<REGION_TO_SEGMENTATION>", _outlines),
}
