"""What commands share: names of types and models, and the order and inputs of tasks."""

import argparse
from pathlib import Path

import pytest

from florence2.cli.main import COMMANDS, main
from florence2.cli.options import DTYPES, check_order, parse_box, read_questions
from florence2.devices import DTYPES as TORCH_DTYPES
from florence2.errors import PromptError
from florence2.train.command import PARTS
from florence2.train.freeze import PARTS as FREEZABLE

BOX, OTHER_BOX = (1.0, 2.0, 3.0, 4.0), (0.0, 0.0, 9.0, 9.0)


def test_names_that_need_no_torch_are_those_of_modules_that_do() -> None:
    assert tuple(TORCH_DTYPES) == DTYPES and tuple(FREEZABLE) == PARTS


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "download"])
def test_help_lists_every_name_of_a_model(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # argparse breaks long lines at hyphens
    with pytest.raises(SystemExit):
        main([name, "--help"])
    names = "nano (comes with the package), base, large, base-ft, large-ft, OWNER/NAME, a folder or a file"
    assert names in capsys.readouterr().out


def test_a_task_takes_its_own_input() -> None:
    tasks = ["od", "caption_to_phrase_grounding", "region_to_ocr"]
    questions = read_questions(tasks, ["a car"], [BOX])
    assert [question.text for question in questions] == [None, "a car", BOX]


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


def test_a_box() -> None:
    assert parse_box("-1,2.5,3,4") == (-1, 2.5, 3, 4)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "1,2,3,nan", "3,2,1,4", "1,4,3,2"])
def test_what_is_not_a_box(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a box; give four numbers X1,Y1,X2,Y2"):
        parse_box(text)


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_swapped_arguments_get_the_order_that_works(
    command: str, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(picture_file), "<OD>"]) == 2
    right = f"The task comes before the image: florence2 {command} '<OD>' {picture_file}"
    assert right in capsys.readouterr().err


def test_stdin_before_its_task() -> None:
    with pytest.raises(PromptError, match="The task comes before the image: florence2 run od -"):
        check_order("run", ["-", "od"])


def test_an_image_without_a_task_gets_an_example(picture_file: Path) -> None:
    with pytest.raises(PromptError, match="must be a task, not .*; for example: florence2 run '<OD>' "):
        check_order("run", [str(picture_file), "Is there a car?"])


@pytest.mark.parametrize("first", ["<OD>", "od", "Is there a car?", "x" * 5000])
def test_a_task_or_prompt_may_come_first(first: str, picture_file: Path) -> None:
    check_order("run", [first, str(picture_file)])
