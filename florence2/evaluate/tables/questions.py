"""Questions with the answers of several people: VQAv2, TextVQA, VizWiz."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.evaluate.tables.reading import by_id, check, entry, image_path, objects, read_json, texts


@dataclass(frozen=True)
class PeopleAnswers:
    """What people answered to a question; empty where the truth is not published, as for test splits.

    Attributes:
        answers: Their answers, usually ten.
        question_id: What the owner's server calls the question.
    """

    answers: list[str]
    question_id: int | str


def read_vqa(
    questions: Path, annotations: Path | None, images: Path, name: str
) -> Iterator[BenchmarkExample[PeopleAnswers]]:
    """Yield the questions of VQAv2.

    Args:
        questions: The file of questions.
        annotations: The file of answers; None for a split whose answers are not published.
        images: The folder of COCO's images.
        name: The beginning of their names, such as "COCO_val2014_".
    """
    asked = _by_question(questions, "questions")
    given = {} if annotations is None else _by_question(annotations, "annotations")
    for number, question in asked.items():
        place = f"{questions}: question {number}"
        if annotations is not None and number not in given:
            raise TableError(f"{annotations} has no answers to the question {number} of {questions}.")
        people = _answers(given[number], f"{annotations}: question {number}") if number in given else []
        image = entry(question, "image_id", int, place)
        path = image_path(images, f"{name}{image:012d}.jpg", f"{place}.image_id")
        yield BenchmarkExample(
            str(number), path, entry(question, "question", str, place), PeopleAnswers(people, number)
        )


def read_textvqa(file: Path, images: Path) -> Iterator[BenchmarkExample[PeopleAnswers]]:
    """Yield the questions of TextVQA, whose answers are in the same file."""
    questions = _by_question(file, "data")
    _check_answered(questions.values(), file)
    for number, value in questions.items():
        place = f"{file}: question {number}"
        path = image_path(images, f"{entry(value, 'image_id', str, place)}.jpg", f"{place}.image_id")
        people = texts(value["answers"], f"{place}.answers") if "answers" in value else []
        yield BenchmarkExample(str(number), path, entry(value, "question", str, place), PeopleAnswers(people, number))


def read_vizwiz(file: Path, images: Path) -> Iterator[BenchmarkExample[PeopleAnswers]]:
    """Yield the questions of VizWiz, one for each image; their ids are the names of the images."""
    seen: set[str] = set()
    questions = list(objects(read_json(file), f"{file}: the list"))
    _check_answered([value for _, value in questions], file)
    for place, value in questions:
        name = entry(value, "image", str, place)
        if name in seen:
            raise TableError(
                f"{place}.image is {name[:60]!r}, the image of an earlier entry too; images must not repeat."
            )
        seen.add(name)
        people = _answers(value, place) if "answers" in value else []
        path = image_path(images, name, f"{place}.image")
        yield BenchmarkExample(name, path, entry(value, "question", str, place), PeopleAnswers(people, name))


def _by_question(file: Path, name: str) -> dict[int, Mapping[str, Any]]:
    """Return the entries of a part of a file by the ids of their questions."""
    return by_id(check(read_json(file), dict, str(file)).get(name), f"{file}: {name}", "question_id")


def _check_answered(questions: Collection[Mapping[str, Any]], file: Path) -> None:
    """Raise TableError where some questions have answers and others have none."""
    answered = sum("answers" in question for question in questions)
    if 0 < answered < len(questions):
        raise TableError(f"{file} has answers to only {answered:,} of its {len(questions):,} questions.")


def _answers(value: Any, place: str) -> list[str]:
    answers = [entry(each, "answer", str, where) for where, each in objects(value.get("answers"), f"{place}.answers")]
    if not answers:
        raise TableError(f"{place}.answers must hold at least one answer.")
    return answers
