"""Expressions that name one object: RefCOCO, RefCOCO+, RefCOCOg."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.evaluate.tables.detection import Instance, read_instance_file
from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.evaluate.tables.reading import entry, image_path, objects, read_plain_pickle

MAX_EXPRESSIONS = 1_000_000


@dataclass(frozen=True)
class Referent:
    """The object that an expression names, in an image of this width and height in pixels."""

    instance: Instance
    width: int
    height: int

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of its box in pixels."""
        left, top, width, height = self.instance.box
        return left, top, left + width, top + height


def read_expressions(
    refs: Path, instances: Path, images: Path, split: str, outlined: bool = False
) -> Iterator[BenchmarkExample[Referent]]:
    """Yield each sentence of a split with the object that it names.

    Args:
        refs: `refs(unc).p` or `refs(umd).p`, a pickle; no code in it is run.
        instances: `instances.json` next to it.
        images: The folder of COCO's images, train2014.
        split: The split, such as "testA".
        outlined: Whether each object must have a segmentation.
    """
    read, count = read_instance_file(instances), 0
    for place, ref in objects(read_plain_pickle(refs), f"{refs}: refs"):
        if entry(ref, "split", str, place) != split:
            continue
        number, object_id = (entry(ref, key, int, place) for key in ("image_id", "ann_id"))
        image = read.images.get(number)
        instance = None if image is None else image.objects.get(object_id)
        if image is None or instance is None:
            raise TableError(f"{place} is about object {object_id} of image {number}, which {instances} lacks.")
        if outlined and not instance.outline:
            raise TableError(f"{place} is about object {object_id}, which has no segmentation in {instances}.")
        path = image_path(images, read.names[number], f"{instances}: image {number}.file_name")
        for id, sentence in _sentences(ref, place):
            count += 1
            if count > MAX_EXPRESSIONS:
                raise TableError(f"{refs} has more than {MAX_EXPRESSIONS:,} expressions.")
            yield BenchmarkExample(id, path, sentence, Referent(instance, image.width, image.height))


def _sentences(ref: Any, place: str) -> Iterator[tuple[str, str]]:
    for where, sentence in objects(entry(ref, "sentences", list, place), f"{place}.sentences"):
        yield str(entry(sentence, "sent_id", int, where)), entry(sentence, "sent", str, where)
