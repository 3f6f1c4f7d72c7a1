"""Read JSON Lines of `image`, `prefix`, `suffix`: each line is a question about an image.

Instead of `suffix`, which needs location tokens, a line may hold regions in pixels of the upright image:

    {"image": "a.jpg", "prefix": "<OD>", "boxes": [{"label": "cup", "box": [10, 20, 110, 140]}]}
    {"image": "a.jpg", "prefix": "<REGION_PROPOSAL>", "boxes": [{"box": [10, 20, 110, 140]}]}
    {"image": "a.jpg", "prefix": "<OCR_WITH_REGION>", "quads": [{"label": "EXIT", "quad": [5, 5, 60, 8, 59, 30, 4, 7]}]}
    {"image": "a.jpg", "prefix": "<REGION_TO_SEGMENTATION>", "region": [10, 20, 110, 140],
     "polygons": [[12, 20, 108, 25, 60, 138]]}

`region` is the box that the question is about; `polygons` are the outlines of one object. Boxes and quads keep their
order; an empty list teaches the model to find nothing. An empty `suffix` is refused, because the label was probably
lost. Other fields are ignored; a field that is null counts as missing.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from florence2.errors import shown
from florence2.inputs.coordinates import box_to_tokens
from florence2.inputs.tasks import TASKS, AnswerKind, Task, find_task
from florence2.train.entries import DataError, Entry, Problems, read_answer, read_pixels, read_text
from florence2.train.images import ImageFolder
from florence2.train.targets import Size, boxes_target, polygons_target, quads_target

_LEADING_TOKEN = re.compile(r"<[A-Z][\w-]{0,61}>", re.ASCII)


def read_rows(path: Path, folder: ImageFolder, problems: Problems, known: Mapping[str, Task] = TASKS) -> list[Entry]:
    """Read an Entry from every line that is not empty, in order; `problems` collects the faults, by line number.

    `known` holds the tasks of the model.
    """
    entries = []
    with path.open("rb") as file:
        for line_number, line in enumerate(file, 1):
            if line.strip():
                place = f"line {line_number}"
                with problems.at(place):
                    entries.append(_read_row(_parse(line), place, folder, known))
    return entries


def leading_tokens(path: Path) -> Iterator[str]:
    """Yield the task token that begins the prompt of a line, for each line with one; `read_rows` reports bad lines."""
    with path.open("rb") as file:
        for line in file:
            try:
                prefix = _parse(line).get("prefix") if b"<" in line else None
            except DataError:
                continue
            token = _LEADING_TOKEN.match(prefix) if isinstance(prefix, str) else None
            if token is not None:
                yield token.group()


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error}); write one object in each line.") from None
    if not isinstance(values, dict):
        raise DataError(f"must hold one JSON object, not {shown(values)}.")
    return {key: value for key, value in values.items() if value is not None}


def _read_row(row: dict[str, Any], place: str, folder: ImageFolder, known: Mapping[str, Task]) -> Entry:
    image = folder.find(read_text(row, "image"))
    prefix = read_text(row, "prefix")
    if "region" in row:
        prefix = _with_region(prefix, row["region"], folder.size(image), known)
    given = [key for key in ("suffix", *_REGIONS) if key in row]
    if len(given) != 1:
        problem = f"{' and '.join(given)} are given" if given else "none is given"
        raise DataError(f"the answer must be one of suffix, {', '.join(_REGIONS)}, but {problem}.")
    key = given[0]
    if key == "suffix":
        suffix = read_answer(row, key)
    else:
        suffix = _build(key, row[key], find_task(prefix, known), prefix, folder.size(image))
    return Entry(image, place, prefix, suffix, known)


def _with_region(prefix: str, region: object, image_size: Size, known: Mapping[str, Task]) -> str:
    task = find_task(prefix, known)
    token = task.token if task and task.alias == prefix else prefix
    return token + box_to_tokens(read_pixels(region, image_size), image_size)


def _build(key: str, items: object, task: Task | None, prefix: str, image_size: Size) -> str:
    kinds, build = _REGIONS[key]
    if task is None or task.answer not in kinds:
        raise DataError(f"{key} cannot answer {shown(prefix)}; give suffix, or another task.")
    if not isinstance(items, list) or (key == "polygons" and not items):
        raise DataError(f"{key} is {shown(items)}; it must be a list{' of outlines' * (key == 'polygons')}.")
    return build(items, image_size, task.answer)


def _boxes(items: list[Any], image_size: Size, kind: AnswerKind) -> str:
    bare = kind == "proposals"
    return boxes_target([_labelled(item, "box", image_size, bare) for item in items], image_size)


def _quads(items: list[Any], image_size: Size, kind: AnswerKind) -> str:  # noqa: ARG001
    return quads_target([_labelled(item, "quad", image_size) for item in items], image_size)


def _polygons(items: list[Any], image_size: Size, kind: AnswerKind) -> str:  # noqa: ARG001
    return polygons_target([read_pixels(item, image_size) for item in items], image_size)


def _labelled(item: Any, key: str, image_size: Size, bare: bool = False) -> tuple[str, list[float]]:
    if not isinstance(item, dict) or key not in item:
        raise DataError(f"{shown(item)} must be an object with {key!r}{'' if bare else ' and label'}.")
    if bare and item.get("label"):
        raise DataError(f"the label {shown(item['label'])} does not belong there: this task answers with boxes alone.")
    label = "" if bare else read_text(item, "label").strip()
    if not (label or bare):
        raise DataError(f"the label of {key} {shown(item[key])} is empty; the parser drops locations without a label.")
    return label, read_pixels(item[key], image_size)


_REGIONS: dict[str, tuple[tuple[AnswerKind, ...], Callable[[list[Any], Size, AnswerKind], str]]] = {
    "boxes": (("boxes", "proposals", "phrases", "boxes_or_polygons"), _boxes),
    "quads": (("quads",), _quads),
    "polygons": (("polygons",), _polygons),
}
"""The fields that may replace `suffix`: the kinds of answers they fit, and how they become text."""
