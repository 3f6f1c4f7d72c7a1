"""Phrases of captions and their boxes: Flickr30k Entities."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.evaluate.tables.reading import image_path, read_text, read_xml

MAX_IMAGES = 100_000


@dataclass(frozen=True)
class Phrase:
    """A phrase of a sentence: its words, and its boxes (left, top, right, bottom in pixels), at least one."""

    words: str
    boxes: list[tuple[float, ...]]


@dataclass(frozen=True)
class Phrases:
    """The phrases of a sentence that have boxes, in its order."""

    phrases: list[Phrase]


def read_entities(folder: Path, images: Path, split: str) -> Iterator[BenchmarkExample[Phrases]]:
    """Yield the sentences of a split that have phrases with boxes.

    Phrases without boxes, such as those for the whole scene, are left out, as in MDETR's evaluation.
    """
    names = read_text(folder / f"{split}.txt").split()
    if len(names) > MAX_IMAGES:
        raise TableError(f"{folder / split}.txt names {len(names):,} images; at most {MAX_IMAGES:,} are read.")
    if len(set(names)) < len(names):
        raise TableError(f"{folder / split}.txt names an image twice; names must not repeat.")
    for name in names:
        path = image_path(images, f"{name}.jpg", f"{folder / split}.txt")
        boxes = _read_boxes(folder / "Annotations" / f"{name}.xml")
        file = folder / "Sentences" / f"{name}.txt"
        for number, line in enumerate(filter(None, read_text(file).split("\n"))):
            sentence, found = _read_sentence(line, f"{file} line {number + 1}")
            phrases = [Phrase(words, boxes[id]) for id, words in found if id in boxes]
            if phrases:
                yield BenchmarkExample(f"{name}_{number}", path, sentence, Phrases(phrases))


def _read_sentence(line: str, where: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a sentence, "[/EN#12/people Two men] talk", without its marks, and its phrases with their ids."""
    words: list[str] = []
    phrases: list[tuple[str, str]] = []
    begin: int | None = None
    id = ""
    for word in line.split():
        if begin is None and word.startswith("["):
            mark, _, id = word.partition("#")
            if mark != "[/EN" or not id:
                raise TableError(f"{where} has the mark {word[:60]!r}; a phrase begins with [/EN#NUMBER/TYPE.")
            begin, id = len(words), id.partition("/")[0]
            continue
        ends = begin is not None and word.endswith("]")
        words.append(word[:-1] if ends else word)
        if ends:
            phrases.append((id, " ".join(words[begin:])))
            begin = None
    if begin is not None:
        raise TableError(f"{where} has a phrase without its end, ].")
    return " ".join(words), phrases


def _read_boxes(file: Path) -> dict[str, list[tuple[float, ...]]]:
    """Return the boxes of each id of an annotation."""
    boxes: dict[str, list[tuple[float, ...]]] = {}
    for place in read_xml(file).findall("object"):
        box = place.find("bndbox")
        if box is None:
            continue
        corners = tuple(_read_side(box, side, file) for side in ("xmin", "ymin", "xmax", "ymax"))
        if corners[0] > corners[2] or corners[1] > corners[3]:
            raise TableError(f"{file} has a box whose right or bottom comes before its left or top.")
        for name in place.findall("name"):
            boxes.setdefault(name.text or "", []).append(corners)
    return boxes


def _read_side(box: Element, side: str, file: Path) -> float:
    text = (box.findtext(side) or "").strip()
    if not (text.removeprefix("-").isdecimal() and len(text) < 10):
        raise TableError(f"{file} has a box whose {side} is {text[:60]!r}; it must be a whole number.")
    return float(text)
