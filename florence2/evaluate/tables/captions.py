"""Captions: the Karpathy split of COCO, COCO's own caption files, NoCaps, TextCaps."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.evaluate.tables.reading import by_id, check, describe, entry, image_path, objects, read_json, texts

DOMAINS = ("in-domain", "near-domain", "out-domain")
"""Those of NoCaps: whether COCO has the objects that an image shows."""


@dataclass(frozen=True)
class References:
    """The references of one image, and the domain that NoCaps puts it into."""

    references: list[str]
    domain: str | None = None


def read_karpathy(file: Path, images: Path, split: str) -> Iterator[BenchmarkExample[References]]:
    """Yield the images of a split of `dataset_coco.json`; the file names the folder of each below `images`."""
    values = check(read_json(file), dict, str(file))
    for place, image in objects(values.get("images"), f"{file}: images"):
        if entry(image, "split", str, place) != split:
            continue
        folder = image_path(images, str(image.get("filepath", ".")), f"{place}.filepath")
        path = image_path(folder, entry(image, "filename", str, place), f"{place}.filename")
        sentences = entry(image, "sentences", list, place)
        references = [entry(each, "raw", str, where) for where, each in objects(sentences, f"{place}.sentences")]
        yield BenchmarkExample(str(entry(image, "imgid", int, place)), path, None, References(_some(references, place)))


def read_coco_captions(file: Path, images: Path) -> Iterator[BenchmarkExample[References]]:
    """Yield the images of a file in COCO's form for captions, which NoCaps has too, with a domain for each image."""
    values = check(read_json(file), dict, str(file))
    references: dict[int, list[str]] = defaultdict(list)
    for place, annotation in objects(values.get("annotations"), f"{file}: annotations"):
        references[entry(annotation, "image_id", int, place)].append(entry(annotation, "caption", str, place))
    for number, image in by_id(values.get("images"), f"{file}: images").items():
        place = f"{file}: image {number}"
        path = image_path(images, entry(image, "file_name", str, place), f"{place}.file_name")
        domain = image.get("domain")
        if domain not in (None, *DOMAINS):
            raise TableError(f"{place}.domain is {describe(domain)}; the domains are {', '.join(DOMAINS)}.")
        yield BenchmarkExample(str(number), path, None, References(_some(references[number], place), domain))


def read_textcaps(file: Path, images: Path) -> Iterator[BenchmarkExample[References]]:
    """Yield the images of a TextCaps file, which has one entry for each caption, or for each image."""
    values = check(read_json(file), dict, str(file))
    references: dict[str, list[str]] = {}
    for place, value in objects(values.get("data"), f"{file}: data"):
        name = entry(value, "image_id", str, place)
        if name not in references:
            references[name] = _references(value, place)
    for name, each in references.items():
        yield BenchmarkExample(name, image_path(images, f"{name}.jpg", f"{file}: image_id"), None, References(each))


def _references(value: Any, place: str) -> list[str]:
    if "reference_strs" in value:
        return texts(value["reference_strs"], f"{place}.reference_strs")
    return [entry(value, "caption_str", str, place)]


def _some(references: list[str], place: str) -> list[str]:
    if not references:
        raise TableError(f"{place} has no captions.")
    return references
