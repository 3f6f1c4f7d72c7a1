"""The answers of a run: examples become images with questions for the journal, and rows of the journal answers."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from florence2.bulk.rows import TaskQuestion, restore_result
from florence2.dataset.index import open_index
from florence2.evaluate.protocols import Protocol
from florence2.evaluate.scoring import AnsweredExample, StoredAnswer
from florence2.evaluate.tables.example import BenchmarkExample
from florence2.evaluate.tables.reading import MAX_COORDINATE
from florence2.label.sources.item import Item, file_item

_Key: TypeAlias = tuple[str, str]
_KEPT = ("text", "boxes", "polygons", "image_size")


def first_images(examples: Sequence[BenchmarkExample[Any]], limit: int | None) -> list[BenchmarkExample[Any]]:
    """Return the examples of the first `limit` images, of all for None."""
    chosen = set(list(dict.fromkeys(example.image for example in examples))[:limit])
    return [example for example in examples if example.image in chosen]


def missing_images(examples: Iterable[BenchmarkExample[Any]]) -> tuple[list[Path], int]:
    """Return the images that are not files, and how many images there are."""
    images = dict.fromkeys(example.image for example in examples)
    return [image for image in images if not image.is_file()], len(images)


def to_items(examples: Iterable[BenchmarkExample[Any]], protocol: Protocol, data: Path) -> list[Item]:
    """Return the images with their questions, so that each image is read once; equal questions are asked once."""
    asked: dict[Path, dict[str, TaskQuestion]] = {}
    for example in examples:
        questions = asked.setdefault(example.image, {})
        for question in protocol.questions(example):
            questions.setdefault(_asked(question.to_dict()), question)
    return [
        Item(file_item(image, _image_id(image, data)).source, tuple(questions.values()))
        for image, questions in asked.items()
    ]


def shard_of(items: Sequence[Item], shard: tuple[int, int] | None) -> Sequence[Item]:
    """Return the i-th of n parts for (i, n), all for None."""
    return items if shard is None else items[shard[0] - 1 :: shard[1]]


def read_answers(folder: Path) -> dict[_Key, StoredAnswer]:
    """Return what the rows of a folder answer, by the image's id and the question.

    Rows with errors are left out, and damaged ones: their questions count as not answered.
    """
    with open_index(folder) as index:
        return {
            (image.id, _asked(row)): {name: row[name] for name in _KEPT if name in row}
            for image in index.images()
            for row in image.rows
            if _is_whole(row)
        }


def _is_whole(row: Mapping[str, Any]) -> bool:
    try:
        restore_result(row)
        regions = [*row.get("boxes", ()), *row.get("polygons", ())]
        return max(row["image_size"]) <= MAX_COORDINATE and all(map(_is_ranked, regions))
    except (KeyError, TypeError, ValueError):
        return False


def _is_ranked(region: Mapping[str, Any]) -> bool:
    score = region.get("score")
    return isinstance(region["label"], str) and (score is None or math.isfinite(score))


def join_answers(
    examples: Iterable[BenchmarkExample[Any]], protocol: Protocol, data: Path, answers: Mapping[_Key, StoredAnswer]
) -> Iterator[AnsweredExample]:
    """Yield each example with its answers, an empty one for each question that has none."""
    for example in examples:
        id = _image_id(example.image, data)
        asked = [(id, _asked(question.to_dict())) for question in protocol.questions(example)]
        yield AnsweredExample(example, [answers.get(key, {}) for key in asked])


def count_unanswered(answered: Iterable[AnsweredExample]) -> int:
    """Return how many examples lack an answer to one of their questions."""
    return sum(not all(each.answers) for each in answered)


def resized_images(answered: Iterable[AnsweredExample]) -> list[Path]:
    """Return the images that have another size than the files of their table say."""
    resized = (
        each.example.image
        for each in answered
        for answer in each.answers
        if answer and answer["image_size"] != [each.example.truth.width, each.example.truth.height]
    )
    return list(dict.fromkeys(resized))


def _image_id(image: Path, data: Path) -> str:
    return image.relative_to(data).as_posix()


def _asked(row: Mapping[str, Any]) -> str:
    return json.dumps([row["task"], row.get("input")])
