"""Each task of a command line comes before the image, and gets the input that it takes."""

from pathlib import Path

import pytest

from florence2.bulk.questions import check_order, read_questions
from florence2.errors import PromptError
from florence2.inputs.tasks import TASKS, Task

BOX, OTHER_BOX = (1.0, 2.0, 3.0, 4.0), (0.0, 0.0, 9.0, 9.0)


def test_a_task_takes_its_own_input() -> None:
    tasks = ["od", "caption_to_phrase_grounding", "region_to_ocr"]
    questions = read_questions(tasks, ["a car"], [BOX])
    assert [question.text for question in questions] == [None, "a car", BOX]


def test_a_task_that_takes_anything_takes_the_text_before_the_box() -> None:
    any_task = {"<LOOK>": Task("<LOOK>", "Look at {input}.", takes="anything")}
    tasks = ["<LOOK>", "region_to_ocr"]
    questions = read_questions(tasks, ["a car"], [BOX], {**TASKS, **any_task})
    assert [question.text for question in questions] == ["a car", BOX]
    assert [question.text for question in read_questions(tasks[:1], None, [BOX], any_task)] == [BOX]


def test_several_texts_are_classes_and_several_boxes_are_questions() -> None:
    (detection,) = read_questions(["open_vocabulary_detection"], ["a car", "a dog"], None)
    assert detection.text == ["a car", "a dog"]
    questions = read_questions(["region_to_ocr", "region_to_category"], None, [BOX, OTHER_BOX])
    assert [(question.name, question.text) for question in questions] == [
        ("<REGION_TO_OCR>", BOX),
        ("<REGION_TO_OCR>", OTHER_BOX),
        ("<REGION_TO_CATEGORY>", BOX),
        ("<REGION_TO_CATEGORY>", OTHER_BOX),
    ]


def test_a_task_under_two_names_is_one_question() -> None:
    assert [question.task for question in read_questions(["od", "<OD>", "caption"], None, None)] == ["od", "caption"]


def test_stdin_before_its_task() -> None:
    with pytest.raises(PromptError, match="The task comes before the image: florence2 run od -"):
        check_order("run", ["-", "od"])


def test_an_image_without_a_task_gets_an_example(picture_file: Path) -> None:
    with pytest.raises(PromptError, match="must be a task, not .*; for example: florence2 run '<OD>' "):
        check_order("run", [str(picture_file), "Is there a car?"])


@pytest.mark.parametrize("first", ["<OD>", "od", "Is there a car?", "x" * 5000])
def test_a_task_or_prompt_may_come_first(first: str, picture_file: Path) -> None:
    check_order("run", [first, str(picture_file)])
