"""Rows of a results file, as runs write them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SIZE = [200, 100]


def row(id: str, task: str = "<OD>", **values: Any) -> dict[str, Any]:
    """A row about an image of 200 x 100 pixels."""
    head = {"image": f"photos/{id}", "place": f"/photos/{id}", "id": id, "task": task}
    return head | values


def boxes(id: str, *labelled: tuple[Any, ...], task: str = "<OD>", **values: Any) -> dict[str, Any]:
    """A row of boxes: (label, x1, y1, x2, y2) or (label, x1, y1, x2, y2, confidence) each."""
    shapes = [
        {"xyxy": list(box[1:5]), "label": box[0], "score": 0.25, "confidence": box[5] if len(box) > 5 else 0.5}
        for box in labelled
    ]
    answer = {"kind": "boxes", "text": "", "raw_text": "</s><s></s>", "image_size": SIZE, "boxes": shapes}
    return row(id, task, **(answer | values))


def polygons(id: str, *outlines: tuple[str, list[list[float]]], **values: Any) -> dict[str, Any]:
    shapes = [{"rings": rings, "label": label, "score": 0.25, "confidence": 0.5} for label, rings in outlines]
    answer = {"kind": "polygons", "text": "", "raw_text": "", "image_size": SIZE, "polygons": shapes}
    return row(id, "<REFERRING_EXPRESSION_SEGMENTATION>", **(answer | values))


def quads(id: str, *texts: tuple[str, list[float]], **values: Any) -> dict[str, Any]:
    shapes = [{"xyxyxyxy": points, "label": text, "score": 0.25, "confidence": 0.5} for text, points in texts]
    answer = {"kind": "quads", "text": "", "raw_text": "", "image_size": SIZE, "quads": shapes}
    return row(id, "<OCR_WITH_REGION>", **(answer | values))


def caption(id: str, text: str, task: str = "<CAPTION>", **values: Any) -> dict[str, Any]:
    answer = {"kind": "text", "text": text, "raw_text": f"</s><s>{text}</s>", "image_size": SIZE}
    return row(id, task, **(answer | values))


def cascade(id: str) -> dict[str, Any]:
    """A caption with two phrases, and an outline for each."""
    part = {"task": "<X>", "raw_text": "", "image_size": SIZE}
    found = [{"xyxy": [0, 0, 50, 50], "label": "a cup", "confidence": 0.5}]
    found.append({"xyxy": [60, 10, 90, 40], "label": "a spoon", "confidence": 0.5})
    outlines = [[{"rings": [[0, 0, 50, 0, 50, 50]], "label": "a cup"}], []]
    return row(
        id,
        "cascade",
        detail="brief",
        caption=part | {"kind": "text", "text": " a cup and a spoon"},
        grounding=part | {"kind": "phrases", "text": "", "boxes": found},
        segments=[part | {"kind": "polygons", "text": "", "polygons": polygon} for polygon in outlines],
    )


def failed(id: str, task: str = "<OD>") -> dict[str, Any]:
    return row(id, task, error=f"{id} cannot be read.")


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]], name: str = "results.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    """The files of a folder, with their content; of links, that of the file."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
