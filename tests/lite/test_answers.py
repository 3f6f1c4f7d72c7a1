"""Answers of the graphs against those of torch: ids, places, log-probabilities, confidences, errors."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import florence2
from florence2 import Florence2, OnlyLabels
from florence2.answers.answer import Answer
from florence2.asking.requests import EncodedImage
from florence2.errors import CheckpointError, Florence2Error, ImageError, OptionError, PromptError
from florence2.inputs.tasks import TASKS
from florence2.lite import Florence2Lite, load
from florence2.lite.cache import SharedDecoder
from florence2.lite.layout import CROSS, EMBED, ENCODER, EXPORT, STEP, VISION, graph_file
from parity.lite import parts
from parity.recipe import make_picture
from recipes.nano.exam import Exam
from tests.release import keep


def assert_same(ours: Answer, theirs: Answer) -> None:
    """Equal but for rounding: `parts` are what must be exactly equal."""
    assert parts(ours) == parts(theirs)
    for mine, their in zip((ours, *ours.alternatives), (theirs, *theirs.alternatives), strict=True):
        assert mine.token_logprobs == pytest.approx(their.token_logprobs, abs=1e-4)
        assert mine.sequence_score == pytest.approx(their.sequence_score, abs=1e-4)
        assert (mine.confidence is None) == (their.confidence is None)
        for one, other in zip(rated(mine), rated(their), strict=True):
            for value, expected in ((one.confidence, other.confidence), (one.score, other.score)):
                assert value == (None if expected is None else pytest.approx(expected, abs=1e-4))


def rated(answer: Answer) -> list[Any]:
    """An answer and its regions, which have scores and confidences."""
    return [answer, *answer.boxes, *answer.quads, *answer.polygons]


@pytest.mark.parametrize("beams", keep([1], [1, 3]))
def test_all_tasks(nano: Florence2, lite: Florence2Lite, scenes: Exam, beams: int) -> None:
    seen = set()
    for sample in (scenes[0], scenes[5]):
        ours, theirs = lite.encode_image(sample.image), nano.encode_image(sample.image)
        for prefix, _ in sample.pairs:
            task = prefix.split(">")[0] + ">"
            if task in seen:
                continue
            seen.add(task)
            assert_same(lite.run(prefix, ours, num_beams=beams), nano.run(prefix, theirs, num_beams=beams))
    assert seen == {*TASKS}


SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": False},
    {"num_beams": 3, "num_return_sequences": 3, "early_stopping": "never", "length_penalty": 1.5, "max_new_tokens": 40},
    {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 20},
    {"num_beams": 1, "max_new_tokens": 5},
    {"forced_bos_token_id": None, "forced_eos_token_id": None, "max_new_tokens": 6},
    {"sample": True, "seed": 3, "num_return_sequences": 4},
    {"sample": True, "seed": 1 << 40, "temperature": 1.7, "top_k": 50, "top_p": 0.9},
    {"confidence": False},
]


@pytest.mark.parametrize("settings", keep(range(0, len(SETTINGS), 3), SETTINGS), ids=str)
def test_settings(nano: Florence2, lite: Florence2Lite, scenes: Exam, settings: dict[str, Any]) -> None:
    """Samples too: a seed draws torch's own numbers."""
    image = scenes[3].image
    for task in ("<OD>", "<DETAILED_CAPTION>"):
        assert_same(lite.run(task, image, **settings), nano.run(task, image, **settings))


def test_only_labels(nano: Florence2, lite: Florence2Lite, scenes: Exam) -> None:
    rule = OnlyLabels(["red circle", "star"], lite.processor)
    ours, theirs = (f.run("<OD>", scenes[1].image, extra_rules=(rule,)) for f in (lite, nano))
    assert {box.label for box in ours.boxes} <= {"red circle", "star"}
    assert_same(ours, theirs)


def test_a_published_folder(nano: Florence2, published: Path, scenes: Exam) -> None:
    """Its merged decoder takes the place of the step, and needs the memory once for each beam."""
    f = load(published, threads=1)
    assert f._graphs.merged is not None
    for beams in (1, 3):
        for task in ("<OD>", "<CAPTION>"):
            assert_same(f.run(task, scenes[2].image, num_beams=beams), nano.run(task, scenes[2].image, num_beams=beams))


@pytest.mark.parametrize(("height", "width"), [(128, 192), (96, 190)])
def test_other_image_sizes(nano: Florence2, lite: Florence2Lite, scenes: Exam, height: int, width: int) -> None:
    def resized(processor: Any) -> Any:
        config = replace(processor.image_config, height=height, width=width, image_seq_length=None)
        return processor.changed(image_config=config)

    ours = Florence2Lite(lite._graphs, lite.config, resized(lite.processor))
    theirs = Florence2(nano.model, resized(nano.processor))
    for task in ("<OD>", "<CAPTION>"):
        assert_same(*(f.run(task, scenes[4].image, max_new_tokens=30) for f in (ours, theirs)))


def test_a_batch_encodes_each_image_once(lite: Florence2Lite, scenes: Exam, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [scenes[index].image for index in range(2)]
    encoded: list[Any] = []
    encode = Florence2Lite.encode_image

    def counted(*args: Any) -> Any:
        encoded.append(args)
        return encode(*args)

    monkeypatch.setattr(Florence2Lite, "encode_image", counted)
    lite.run_batch([("<OD>", images[0]), ("<CAPTION>", images[1]), ("<OCR>", images[0])], max_new_tokens=3)
    assert len(encoded) == 2


@pytest.fixture(scope="module")
def requests(lite: Florence2Lite, scenes: Exam) -> list[Any]:
    """Questions with prompts and answers of many lengths, about images of which some come twice."""
    images = [lite.encode_image(scenes[index].image) for index in range(3)]
    return [
        ("<OD>", images[0]),
        ("<CAPTION>", images[1]),
        ("<REGION_TO_OCR>", images[0], (5, 5, 50, 60)),
        ("<CAPTION_TO_PHRASE_GROUNDING>", images[2], "a red circle and a blue square"),
        ("<DENSE_REGION_CAPTION>", images[2]),
        ("<OCR>", images[1]),
        ("<DETAILED_CAPTION>", images[2]),
    ]


TOGETHER: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 3, "num_return_sequences": 2},
    {"sample": True, "seed": 4, "num_return_sequences": 3},
]


@pytest.mark.parametrize(
    ("settings", "merged"),
    keep([2, 5], [(settings, merged) for settings in TOGETHER for merged in (False, True)]),
    ids=str,
)
def test_a_batch_answers_as_each_question_alone(
    lite: Florence2Lite, published: Path, requests: list[Any], settings: dict[str, Any], merged: bool
) -> None:
    """Memories of other lengths are padded, and a question leaves when its answer ends."""
    f = load(published, threads=1) if merged else lite
    alone = [f.run(*request, **settings) for request in requests]
    assert len({len(answer.token_ids) for answer in alone}) > 3
    for size in (None, 2):
        for together, answer in zip(f.run_batch(requests, batch_size=size, **settings), alone, strict=True):
            assert_same(together, answer)


def test_a_batch_decodes_together(lite: Florence2Lite, requests: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    step = SharedDecoder.step

    def counted(self: SharedDecoder, newest: Any) -> Any:
        rows.append(len(newest))
        return step(self, newest)

    monkeypatch.setattr(SharedDecoder, "step", counted)
    lite.run_batch(requests, num_beams=3, batch_size=7, confidence=False)
    assert rows[0] == 21 and rows[-1] < 21 and rows == sorted(rows, reverse=True)
    rows.clear()
    lite.run_batch(requests, num_beams=3, confidence=False)
    assert max(rows) == 12


def test_graphs_of_one_scale_answer_one_question_at_a_time(
    nano_folder: Path, requests: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These are not of 8 bits: what counts is how many rows a step has."""
    shutil.copytree(nano_folder, tmp_path / "q8")
    for graph in (VISION, EMBED, ENCODER, STEP, CROSS):
        shutil.copy(tmp_path / "q8" / graph_file(graph), tmp_path / "q8" / graph_file(graph, "q8"))
    f, rows = load(tmp_path / "q8", kind="q8", threads=1), set()
    step = SharedDecoder.step

    def counted(self: SharedDecoder, newest: Any) -> Any:
        rows.add(len(newest))
        return step(self, newest)

    monkeypatch.setattr(SharedDecoder, "step", counted)
    f.run_batch(requests[:3], batch_size=3, num_beams=2, max_new_tokens=3)
    assert len([*f.stream(requests[:3], num_beams=2, max_new_tokens=3)]) == 3
    assert rows == {2}


def test_a_stream_keeps_errors_in_their_places(lite: Florence2Lite, requests: list[Any]) -> None:
    broken = ImageError("broken")
    known: dict[int, Any] = {}
    asked = iter([requests[0], broken, ("<FLY>", requests[0][1]), requests[1], requests[2]])
    stream = lite.stream(asked, num_beams=1, arrived=known.__setitem__)
    first = next(stream)
    assert sorted(known) == [0, 1, 2, 3]  # four are taken and answered together
    answers = [first, *stream]
    assert [known[number] for number in range(5)] == answers
    assert answers[1] is broken and isinstance(answers[2], PromptError)
    for answer, request in zip((answers[0], *answers[3:]), (requests[0], *requests[1:3]), strict=True):
        assert_same(answer, lite.run(*request, num_beams=1))


def test_a_refused_question_takes_no_other_with_it(lite: Florence2Lite, requests: list[Any]) -> None:
    long = ("<CAPTION_TO_PHRASE_GROUNDING>", requests[0][1], "a circle " * 600)
    answers = list(lite.stream([requests[0], long, requests[1]], num_beams=1))
    assert isinstance(answers[1], PromptError)
    for answer, request in ((answers[0], requests[0]), (answers[2], requests[1])):
        assert_same(answer, lite.run(*request, num_beams=1))


def test_what_came_before_a_failing_source_is_answered(lite: Florence2Lite, requests: list[Any]) -> None:
    def source() -> Iterator[Any]:
        yield requests[0]
        raise RuntimeError("the source failed")

    stream = lite.stream(source(), num_beams=1)
    assert_same(next(stream), lite.run(*requests[0], num_beams=1))
    with pytest.raises(RuntimeError, match="the source failed"):
        next(stream)


def test_questions_by_name(nano: Florence2, lite: Florence2Lite, scenes: Exam) -> None:
    image = scenes[0].image
    assert_same(lite.caption(image, "detailed"), nano.caption(image, "detailed"))
    assert_same(lite.ocr(image, regions=True), nano.ocr(image, regions=True))
    ours, theirs = lite.cascade(image), nano.cascade(image)
    assert [segment.token_ids for segment in ours.segments] == [segment.token_ids for segment in theirs.segments]
    assert ours.boxes and ours.missing == theirs.missing


def test_an_image_that_torch_encoded(nano: Florence2, lite: Florence2Lite, scenes: Exam) -> None:
    image = scenes[0].image
    encoded = nano.encode_image(image)
    assert_same(lite.run("<OD>", encoded), nano.run("<OD>", image))
    rounded = replace(encoded, features=encoded.features.bfloat16().requires_grad_())
    assert lite.run("<OD>", rounded, num_beams=1, max_new_tokens=3).token_ids


def wrong_calls(f: Any, features: Callable[..., Any], width: int) -> list[Florence2Error]:
    """The errors of wrong calls; `features` makes features of a shape, `width` is the model's."""
    image, errors = make_picture(1, 60, 40), []
    other = replace(f.encode_image(image), features=features(1, 5, 7))
    large = replace(f.encode_image(image), features=features(1, 1020, width))
    for call in (
        lambda: f.run("<FLY>", image),
        lambda: f.run("<OD>", image, "a car"),
        lambda: f.run("<REGION_TO_OCR>", image, "a", box=(1, 2, 3, 4)),
        lambda: f.run("<OD>", b"no image"),
        lambda: f.run("<OD>", image, num_beams=0),
        lambda: f.run("<OD>", image, options=3),
        lambda: f.run("<OD>", image, forced_bos_token_id=1 << 30),
        lambda: f.run("<OD>", f.encode_image(image), background="white"),
        lambda: f.run("<OD>", image, background="no colour"),
        lambda: f.run("<CAPTION_TO_PHRASE_GROUNDING>", image, "car " * 2000),
        lambda: f.run("<OD>", other),
        lambda: f.run("<OD>", large),
        lambda: f.run_batch(3),
        lambda: f.run_batch([("<OD>", image)], batch_size=0),
        lambda: f.stream("<OD>"),
        lambda: f.detect(image, []),
        lambda: f.run("<OD>", image, extra_rules=(Nothing(),)),
        lambda: f.run("<OD>", image, extra_rules=(Nothing(),), num_beams=1),
    ):
        with pytest.raises(Florence2Error) as caught:
            call()
        errors.append(caught.value)
    return errors


class Nothing:
    """A rule that leaves nothing; it writes to tensors and arrays alike."""

    name = "nothing"

    def applies(self, generated: int) -> bool:
        return generated >= 1

    def __call__(self, scores: Any, sequences: Any, generated: Any) -> Any:
        scores[:] = -np.inf
        return scores


def test_errors_are_those_of_torch(nano: Florence2, lite: Florence2Lite) -> None:
    width = lite.config.text.d_model
    ours = wrong_calls(lite, lambda *shape: np.zeros(shape, np.float32), width)
    theirs = wrong_calls(nano, torch.zeros, width)
    assert [(type(error), str(error)) for error in ours] == [(type(error), str(error)) for error in theirs]


def test_grids_beyond_the_table(nano: Florence2, lite: Florence2Lite) -> None:
    config = replace(lite.processor.image_config, height=2048, width=2048, image_seq_length=None)
    texts = []
    for make in (
        lambda: Florence2Lite(lite._graphs, lite.config, lite.processor.changed(image_config=config)),
        lambda: Florence2(nano.model, nano.processor.changed(image_config=config)),
    ):
        with pytest.raises(CheckpointError, match="give a grid of") as caught:
            make()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_a_memory_that_is_not_finite(lite: Florence2Lite) -> None:
    encoded = lite.encode_image(make_picture(1, 60, 40))
    encoded.features[0, 0, 0] = np.nan
    with pytest.raises(Florence2Error, match="values that are not finite"):
        lite.run("<OD>", encoded)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"provider": "abacus"}, "provider is 'abacus', but onnxruntime has only"),
        ({"provider": None}, "provider is None"),
        ({"threads": 0}, "threads is 0; it must be a whole number from 1 to 256"),
        ({"kind": "q5"}, "kind is 'q5'; it must be one of float32"),
        ({"background": "no colour"}, "no colour"),
    ],
)
def test_wrong_arguments(nano_folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        load(nano_folder, **changes)


def test_torch_reads_images_that_were_encoded_without_it(lite: Florence2Lite, nano: Florence2) -> None:
    encoded = lite.encode_image(make_picture(1, 60, 40))
    expected = lite.run("<OD>", encoded).token_ids
    assert nano.run("<OD>", encoded).token_ids == expected
    (streamed,) = nano.stream([("<OD>", encoded)])
    assert isinstance(streamed, Answer) and streamed.token_ids == expected


@pytest.mark.parametrize("shape", [(5, 160), (2, 5, 160), (160,)])
def test_features_of_a_wrong_shape(lite: Florence2Lite, nano: Florence2, shape: tuple[int, ...]) -> None:
    for model, features in ((lite, np.zeros(shape, dtype=np.float32)), (nano, torch.zeros(shape))):
        with pytest.raises(PromptError, match=r"not \(1, N, 160\); make it with encode_image"):
            model.run("<OD>", EncodedImage(features, (10, 10)))


def test_folders_that_cannot_be_opened(nano_folder: Path, published: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder; give one that `florence2 export` has written"):
        load(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"vision_encoder_q4\.onnx is missing"):
        load(nano_folder, kind="q4")
    damaged = tmp_path / "damaged"
    shutil.copytree(published, damaged)
    (damaged / EXPORT).unlink()
    (damaged / "onnx" / "embed_tokens.onnx").write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match=r"onnxruntime cannot read .*embed_tokens\.onnx"):
        load(damaged)


def test_a_picture_of_any_form(lite: Florence2Lite, tmp_path: Path) -> None:
    picture = make_picture(2, 90, 70)
    picture.save(tmp_path / "a.png")
    forms: list[Any] = [tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), np.asarray(picture), picture]
    answers = [lite.run("<OD>", form, num_beams=1) for form in forms]
    assert len({answer.token_ids for answer in answers}) == 1
    assert isinstance(answers[0].draw(picture), Image.Image)


def test_repr_and_options(lite: Florence2Lite, nano: Florence2) -> None:
    assert repr(lite).startswith("Florence2Lite(") and lite.options() == nano.options()
    assert lite.with_tasks([florence2.Task("<VQA>", "{input}", takes="text")]).processor.tasks["<VQA>"]
