"""A checkpoint's processor: pictures and prompts in, answers out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import florence2
from florence2.answers.confidence import Likelihoods
from florence2.errors import CheckpointError, ConfigError, PromptError
from florence2.inputs.processor import input_to_text
from florence2.processor import Processor
from parity.records import read_record


@pytest.fixture(scope="module")
def processor(small_folder: Path) -> Processor:
    return Processor.from_folder(small_folder)


def test_recorded_prompts(processor: Processor) -> None:
    for record in read_record("tokens.json")["prompts"]:
        assert processor.prompt(record["text"]) == record["ids"]
        if record["text"].startswith("<") and ">" in record["text"] and "VQA" not in record["text"]:
            token, _, rest = record["text"].partition(">")
            assert processor.prompt(f"{token}>", rest or None) == record["ids"]


def test_image(processor: Processor, picture: Image.Image) -> None:
    assert processor.image(picture).shape == (1, 3, 160, 224)


def test_boxes_become_location_tokens(processor: Processor) -> None:
    box = processor.prompt("<REGION_TO_OCR>", (33.6, 159.6, 597.0, 372.0), image_size=(640, 480))
    assert box == processor.prompt("<REGION_TO_OCR><loc_52><loc_332><loc_932><loc_775>")
    with pytest.raises(PromptError, match="give image_size"):
        processor.prompt("<REGION_TO_OCR>", (1, 2, 3, 4))


def test_classes_are_joined(processor: Processor) -> None:
    joined = processor.prompt("<OPEN_VOCABULARY_DETECTION>", ["a car", "a dog"])
    assert joined == processor.prompt("<OPEN_VOCABULARY_DETECTION>a car<and>a dog")


@pytest.mark.parametrize("given", [[], [1, 2, 3], [1, 2, 3, 4, 5], ["a", 1], [(1, 2, 3, 4)]])
def test_other_inputs_get_a_sentence(given: object) -> None:
    with pytest.raises(PromptError, match="text, a list of classes, or one box"):
        input_to_text(given, (10, 10))  # type: ignore[arg-type]


def test_recorded_answers_by_text_and_by_ids(processor: Processor) -> None:
    records = read_record("post.json")
    for record in records["post"]:
        answer = processor.answer(record["task"], record["text"], image_size=tuple(record["image_size"]))
        assert answer.to_florence() == record["answer"]
    for record in records["scored"]:
        answer = processor.answer(
            record["task"],
            token_ids=torch.tensor(record["sequence"]),
            token_logprobs=record["transition_scores"],
            image_size=tuple(record["image_size"]),
        )
        found, expected = answer.to_florence()[record["task"]], record["answer"][record["task"]]
        assert found.pop("scores") == pytest.approx(expected.pop("scores"), abs=1e-6) and found == expected


def test_the_task_of_an_answer_is_its_token(processor: Processor) -> None:
    size = (10, 10)
    assert processor.answer("od", "", image_size=size).task == "<OD>"
    assert (
        processor.answer("<OPEN_VOCABULARY_DETECTION>a car", "", image_size=size).task == "<OPEN_VOCABULARY_DETECTION>"
    )
    assert processor.answer("Where?", "here", image_size=size).to_florence() == {"Where?": "here"}


def test_ids_without_probabilities_have_no_scores(processor: Processor) -> None:
    ids = [2, *processor.encode("car<loc_1><loc_2><loc_3><loc_4>")]
    answer = processor.answer("<OD>", token_ids=ids, image_size=(10, 10))
    assert answer.boxes[0].score is None and answer.token_ids == tuple(ids)
    assert answer.raw_text == processor.decode(ids)


def test_wrong_answers_get_a_sentence(processor: Processor) -> None:
    with pytest.raises(PromptError, match="exactly one"):
        processor.answer("<OD>", image_size=(1, 1))
    with pytest.raises(PromptError, match="exactly one"):
        processor.answer("<OD>", "x", token_ids=[2], image_size=(1, 1))
    with pytest.raises(PromptError, match="need 2 token_logprobs, not 3"):
        processor.answer("<OD>", token_ids=[2, 0, 5], token_logprobs=[0.0, 0.0, 0.0], image_size=(1, 1))


@pytest.mark.parametrize("length", [1, 3])
def test_likelihoods_of_another_length_are_refused(length: int, processor: Processor) -> None:
    likelihoods = Likelihoods(np.zeros(length), np.zeros((length, 1000)))
    with pytest.raises(PromptError, match=rf"have the shapes \({length},\) and \({length}, 1000\); of 2 ids after"):
        processor.answer("<OD>", token_ids=[2, 0, 5], likelihoods=likelihoods, image_size=(1, 1))


def test_missing_files_get_a_sentence(small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        Processor.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((small_folder / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError, match="preprocessor_config.json does not exist"):
        Processor.from_folder(tmp_path)


def test_the_size_of_an_image_may_come_from_numpy(small: florence2.Florence2) -> None:
    answer = small.processor.answer("<OD>", "a<loc_1><loc_2><loc_3><loc_4>", image_size=np.array([640, 480]))
    assert answer.to_dict()["image_size"] == [640, 480]
    for wrong in ({640, 480}, b"\1\2"):
        with pytest.raises(florence2.Florence2Error, match=r"\(width, height\)"):
            small.processor.answer("<OD>", "a", image_size=wrong)
