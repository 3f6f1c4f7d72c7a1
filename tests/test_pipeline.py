"""Florence2: every task, batches against singles, encode once, errors."""

import json
import re
import shutil
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import florence2
from florence2 import loading
from florence2.asking import processor as processor_module
from florence2.asking import requests as request_module
from florence2.asking.requests import check_request
from florence2.checkpoints import checkpoint
from florence2.checkpoints.checkpoint import load_model
from florence2.errors import CheckpointError, Florence2Error, HubError, ImageError, OptionError, PromptError
from florence2.inputs import tasks
from florence2.inputs.tasks import TASKS, find_task
from florence2.model.florence2 import Florence2Model
from parity.cases import shapes
from parity.recipe import make_model, make_picture
from tests.conftest import count_encodings, random_box
from tests.release import keep

SHORT = {"max_new_tokens": 24}
INPUTS: dict[str, Any] = {"nothing": None, "text": "a green car", "region": (20.0, 30.0, 200.0, 150.0)}


def requests_of_all_tasks() -> list[tuple[Any, ...]]:
    """The fifteen tasks on pictures of different sizes, with prompts of every length."""
    rng = np.random.default_rng(0)
    requests = []
    for i, task in enumerate(TASKS.values()):
        size = (int(rng.integers(40, 400)), int(rng.integers(40, 400)))
        given: Any = INPUTS[task.takes]
        if task.takes == "region":
            given = random_box(rng, *size)
        if task.token == "<OPEN_VOCABULARY_DETECTION>":
            given = ["a green car", "two dogs under a tree"]
        requests.append((task.token, make_picture(50 + i, *size), given))
    return [*requests, ("What is in the picture, exactly?", make_picture(80, 99, 60), None)]


@pytest.mark.parametrize("beams", keep([1], [1, 3]))
def test_batches_equal_singles_over_all_tasks(small: florence2.Florence2, beams: int) -> None:
    options = small.options(**SHORT, num_beams=beams)
    requests = requests_of_all_tasks()
    together = small.run_batch(requests, options=options, batch_size=16)
    lengths = {len(small.processor.prompt(r[0], r[2], r[1].size)) for r in requests}
    assert len(lengths) > 5  # there was something to pad
    for request, answer in zip(requests, together, strict=True):
        alone = small.run(*request, options=options)
        assert answer.token_ids == alone.token_ids, request[0]
        assert answer.token_logprobs == pytest.approx(alone.token_logprobs, abs=2e-4)
        assert answer.finish_reason == alone.finish_reason and answer.image_size == request[1].size


def test_without_the_mask_a_batch_would_differ(small: florence2.Florence2) -> None:
    """What the test above guards against does change tokens here: attend to the padding, as the reference does."""
    requests = requests_of_all_tasks()[-9:]
    options = small.options(**SHORT, num_beams=1)
    ids = [small.processor.prompt(r[0], r[2], r[1].size) for r in requests]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [1] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        features = torch.cat([small.encode_image(r[1]).features for r in requests])
        unmasked = florence2.generate(small.model, small.model.encode(features, padded), options)
    singles = [small.run(*r, options=options).token_ids for r in requests]
    rows = [tuple(row[: 1 + n].tolist()) for row, n in zip(unmasked.sequences, unmasked.lengths, strict=True)]
    assert rows != singles


@pytest.mark.parametrize("batch_size", keep([1], [1, 3]))
def test_batch_size_does_not_matter(small: florence2.Florence2, batch_size: int) -> None:
    options = small.options(**SHORT)
    requests = requests_of_all_tasks()[:7]
    whole = small.run_batch(requests, options=options, batch_size=7)
    assert [a.token_ids for a in small.run_batch(requests, options=options, batch_size=batch_size)] == [
        a.token_ids for a in whole
    ]


def test_encoded_pictures_serve_every_task(
    small: florence2.Florence2, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small.options(**SHORT)
    direct = [small.run(task, picture, options=options) for task in ("<OD>", "<CAPTION>")]
    encoded = small.encode_image(picture)
    monkeypatch.setattr(small.model, "encode_image", lambda *_: pytest.fail("encoded again"))
    assert encoded.size == picture.size
    assert [small.run(task, encoded, options=options) for task in ("<OD>", "<CAPTION>")] == direct


def test_a_picture_in_a_batch_several_times_is_encoded_once(
    small: florence2.Florence2, picture: Image.Image, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_encodings(small, monkeypatch)
    options = small.options(max_new_tokens=2)
    small.run_batch(
        [("<OD>", picture), ("<CAPTION>", picture), ("<OCR>", picture_file), ("<OD>", str(picture_file))],
        options=options,
    )
    assert sum(calls) == 2


def test_every_form_of_picture(small: florence2.Florence2, picture: Image.Image, picture_file: Path) -> None:
    options = small.options(max_new_tokens=8)
    sources = [
        picture,
        picture_file,
        str(picture_file),
        picture_file.read_bytes(),
        np.asarray(picture),
        small.encode_image(picture),
    ]
    assert len({small.run("<CAPTION>", source, options=options).token_ids for source in sources}) == 1


def test_inputs_in_pixels_and_as_tokens(small: florence2.Florence2, picture: Image.Image) -> None:
    options = small.options(max_new_tokens=8)
    box = (20.0, 30.0, 200.0, 150.0)
    tokens = "".join(f"<loc_{b}>" for b in florence2.pixels_to_bins(box, picture.size))
    answers = [
        small.run("<REGION_TO_OCR>", picture, box, options=options),
        small.run("<REGION_TO_OCR>", picture, box=box, options=options),
        small.run("<REGION_TO_OCR>", picture, tokens, options=options),
        small.run(f"<REGION_TO_OCR>{tokens}", picture, options=options),
        small.run("region_to_ocr", picture, np.array(box), options=options),
    ]
    assert len({answer.token_ids for answer in answers}) == 1 and {a.task for a in answers} == {"<REGION_TO_OCR>"}


def test_answers_carry_everything(small: florence2.Florence2, picture: Image.Image) -> None:
    options = small.options(max_new_tokens=30)
    answer = small.run("<OD>", picture, options=options)
    ids = torch.tensor([small.processor.prompt("<OD>")])
    with torch.no_grad():
        memory = small.model.encode(small.encode_image(picture).features, ids)
    found = florence2.generate(small.model, memory, options)
    assert list(answer.token_ids) == found.sequences[0].tolist()
    assert answer.token_logprobs == pytest.approx(found.token_logprobs[0].tolist())
    assert answer.sequence_score == pytest.approx(float(found.sequence_scores[0]))
    assert answer.raw_text == small.processor.decode(found.sequences[0].tolist())
    assert answer.to_florence()["<OD>"].keys() >= {"bboxes", "labels"}
    assert json.loads(answer.to_json())["image_size"] == list(picture.size)
    assert answer.draw(picture).size == picture.size


def test_alternatives(small: florence2.Florence2, picture: Image.Image) -> None:
    answer = small.run("<CAPTION>", picture, options=small.options(num_return_sequences=3, max_new_tokens=12))
    scores = [answer.sequence_score, *(other.sequence_score for other in answer.alternatives)]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    assert len({answer.token_ids, *(other.token_ids for other in answer.alternatives)}) == 3


def test_an_answer_cut_short_says_so(small: florence2.Florence2, picture: Image.Image) -> None:
    assert small.run("<CAPTION>", picture, options=small.options(max_new_tokens=3)).finish_reason == "length"
    long = small.run(
        "<CAPTION>", picture, options=small.options(max_new_tokens=10_000, min_new_tokens=690, num_beams=1)
    )
    assert (
        long.finish_reason == "length" and len(long.token_logprobs) == small.model.config.text.max_position_embeddings
    )


def test_shorthands_name_the_right_tasks(
    small: florence2.Florence2, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    answer = small.run("<CAPTION>", picture, options=small.options(max_new_tokens=2))

    def run(_: Any, task: str, image: Any, text: Any = None, *, box: Any = None, options: Any) -> florence2.Answer:
        asked.append((task, text, box))
        return answer

    monkeypatch.setattr(type(small), "run", run)
    box = (1, 2, 3, 4)
    small.caption(picture)
    small.caption(picture, "more_detailed")
    small.detect(picture)
    small.detect(picture, ["a", "b"])
    small.ground(picture, "a car")
    small.segment(picture, "a car")
    small.segment(picture, box=box)
    small.ocr(picture)
    small.ocr(picture, regions=True)
    small.ocr(picture, box=box)
    small.describe(picture, box)
    assert asked == [
        ("<CAPTION>", None, None),
        ("<MORE_DETAILED_CAPTION>", None, None),
        ("<OD>", None, None),
        ("<OPEN_VOCABULARY_DETECTION>", ["a", "b"], None),
        ("<CAPTION_TO_PHRASE_GROUNDING>", "a car", None),
        ("<REFERRING_EXPRESSION_SEGMENTATION>", "a car", None),
        ("<REGION_TO_SEGMENTATION>", None, box),
        ("<OCR>", None, None),
        ("<OCR_WITH_REGION>", None, None),
        ("<REGION_TO_OCR>", None, box),
        ("<REGION_TO_DESCRIPTION>", None, box),
    ]
    with pytest.raises(PromptError, match="detail is 'long'"):
        small.caption(picture, "long")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("<VQA>how many?",), "Unknown task <VQA>"),
        (("<OD>", "cars"), "takes no input"),
        (("<REGION_TO_OCR>", "the sign"), "needs a region"),
        (("<REGION_TO_OCR>", (9, 9, 1, 1)), "x1 <= x2"),
        (("<REGION_TO_OCR>", (5000, 1, 6000, 2)), "outside the image"),
        (("<OPEN_VOCABULARY_DETECTION>",), "needs a text"),
        (("<CAPTION_TO_PHRASE_GROUNDING>", "word " * 900), "more than the 700 of this checkpoint"),
    ],
)
def test_wrong_requests_get_a_sentence(
    small: florence2.Florence2, picture: Image.Image, arguments: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(PromptError, match=words):
        small.run(arguments[0], picture, *arguments[1:])


def test_a_bad_prompt_stops_a_batch_before_it_costs_anything(
    small: florence2.Florence2, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small.model, "encode_image", lambda *_: pytest.fail("computed"))
    with pytest.raises(PromptError):
        small.run_batch([("<OD>", picture), ("<VQA>", picture)])
    with pytest.raises(ImageError):
        small.run_batch([("<OD>", picture), ("<OD>", b"junk")])


def test_two_inputs_and_wrong_sizes(small: florence2.Florence2, picture: Image.Image) -> None:
    with pytest.raises(PromptError, match="two inputs"):
        small.run("<REGION_TO_OCR>", picture, "x", box=(1, 2, 3, 4))
    with pytest.raises(OptionError, match="at least 1"):
        small.run_batch([("<OD>", picture)], batch_size=0)
    foreign = florence2.EncodedImage(torch.zeros(1, 5, 32), (10, 10))
    with pytest.raises(PromptError, match="come from different models"):
        small.run("<OD>", foreign)
    assert small.run_batch([]) == []


def test_settings_as_keywords(small: florence2.Florence2, picture: Image.Image) -> None:
    """Every way of asking takes them, alone or on top of options."""
    encoded, box = small.encode_image(picture), (20.0, 30.0, 200.0, 150.0)
    expected = small.run("<OD>", encoded, options=small.options(num_beams=1, max_new_tokens=5))
    assert len(expected.token_logprobs) == 5
    assert small.run("<OD>", encoded, num_beams=1, max_new_tokens=5) == expected
    assert small.run("<OD>", encoded, options=small.options(num_beams=1), max_new_tokens=5) == expected
    assert small.run_batch([("<OD>", encoded)], num_beams=1, max_new_tokens=5) == [expected]
    assert small.detect(encoded, num_beams=1, max_new_tokens=5) == expected
    five = {"min_new_tokens": 5, "max_new_tokens": 5}
    answers = [
        small.caption(encoded, **five),
        small.detect(encoded, ["a cup"], **five),
        small.ground(encoded, "a cup", **five),
        small.segment(encoded, "a cup", **five),
        small.segment(encoded, box=box, **five),
        small.ocr(encoded, **five),
        small.ocr(encoded, box=box, **five),
        small.describe(encoded, box, **five),
        small.cascade(encoded, **five).caption,
    ]
    assert {len(answer.token_logprobs) for answer in answers} == {5}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beams": 1}, "Unknown generation settings: beams. Known ones: num_beams, "),
        ({"num_beams": 0}, "num_beams is 0; it must be a whole number of at least 1"),
        ({"options": {"num_beams": 1}}, "options is {'num_beams': 1}, not a GenerationOptions; write f.options"),
        ({"options": None, "max_new_tokens": "9"}, "max_new_tokens is '9'"),
    ],
)
def test_wrong_settings_get_a_sentence(
    small: florence2.Florence2, picture: Image.Image, settings: dict[str, Any], words: str
) -> None:
    for ask in (small.caption, small.detect, small.cascade):
        with pytest.raises(OptionError, match=re.escape(words)):
            ask(picture, **settings)
    with pytest.raises(OptionError, match=re.escape(words)):
        small.run_batch([("<OD>", picture)], **settings)


@pytest.mark.parametrize("size", [2.5, True, 0, "8"])
def test_wrong_batch_sizes(small: florence2.Florence2, picture: Image.Image, size: Any) -> None:
    with pytest.raises(OptionError, match=f"batch_size is {size!r}; it must be a whole number of at least 1"):
        small.run_batch([("<OD>", picture)], batch_size=size)


def test_shorthands_refuse_what_no_task_does(small: florence2.Florence2, picture: Image.Image) -> None:
    box = (1, 2, 3, 4)
    empty: list[Any] = [[], (), "", " "]
    for classes in empty:
        with pytest.raises(PromptError, match="name at least one class, or leave out classes"):
            small.detect(picture, classes)
    with pytest.raises(PromptError, match="regions=True and a box"):
        small.ocr(picture, regions=True, box=box)
    with pytest.raises(PromptError, match="segment got neither text nor box; give a text"):
        small.segment(picture)
    with pytest.raises(PromptError, match="segment got both text='a cup' and box="):
        small.segment(picture, "a cup", box=box)
    for task, words in (("<CAPTION>", "takes no box"), ("a free prompt", "takes no box"), ("<VQA>", "<VQA>")):
        with pytest.raises(PromptError, match=words):
            small.run(task, picture, box=box)
    with pytest.raises(PromptError, match="got its input twice"):
        small.run("<REGION_TO_OCR><loc_1><loc_1><loc_2><loc_2>", picture, box=box)
    wrong_inputs: list[Any] = [5, [], {}, (1, 2, 3), (1, 2, "x", 4)]
    for wrong in wrong_inputs:
        with pytest.raises(PromptError, match="must be text, a list of classes, or one box"):
            small.run("<REGION_TO_OCR>", picture, wrong)


def test_a_prompt_with_braces_is_read_as_written(small: florence2.Florence2, picture: Image.Image) -> None:
    for prompt in ("What is {input} here?", florence2.FreePrompt("{input}")):
        (request,) = [check_request((prompt, picture))]
        assert request.sentence(picture.size) == prompt
        assert small.run(prompt, picture, max_new_tokens=2).task == prompt


def test_a_task_is_looked_up_once(
    small: florence2.Florence2, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups = []

    def counted(prompt: str, known: Mapping[str, tasks.Task] = TASKS) -> tasks.Task | None:
        lookups.append(prompt)
        return find_task(prompt, known)

    for module in (tasks, request_module, processor_module):
        monkeypatch.setattr(module, "find_task", counted)
    small.run_batch([("<OD>", picture), ("a free prompt", picture)], max_new_tokens=2)
    small.run("<REGION_TO_OCR>", picture, box=(1, 2, 30, 40), max_new_tokens=2)
    assert lookups == ["<OD>", "a free prompt", "<REGION_TO_OCR>"]


def test_encoded_images_know_their_source(small: florence2.Florence2, picture: Image.Image, picture_file: Path) -> None:
    array = np.asarray(picture)
    for source in (picture, picture_file, str(picture_file), array):
        assert small.prepare_image(source).source is source and small.encode_image(source).source is source
    assert small.encode_image(picture_file.read_bytes()).source is None
    assert "source" not in repr(small.prepare_image(picture))


def test_a_model_is_shown_in_one_line(small_folder: Path, small: florence2.Florence2) -> None:
    assert repr(florence2.load("nano", device="cpu")).startswith("Florence2(nano, ")
    count = sum(parameter.numel() for parameter in small.model.parameters()) / 1e6
    assert repr(small) == f"Florence2({small_folder}, {count:.1f}M parameters, cpu, float32)"
    unnamed = florence2.Florence2(small.model.to(torch.float32), small.processor)
    assert repr(unnamed) == f"Florence2({count:.1f}M parameters, cpu, float32)"
    assert "Florence2Model(\n" in repr(small.model)


def test_threads_share_one_model(small: florence2.Florence2) -> None:
    pictures = [make_picture(seed, 100, 80) for seed in range(4)]
    options = small.options(max_new_tokens=12)
    alone = [small.run("<OD>", picture, options=options) for picture in pictures]
    results: dict[int, florence2.Answer] = {}
    threads = [
        threading.Thread(
            target=lambda i: results.__setitem__(i, small.run("<OD>", pictures[i], options=options)), args=(i,)
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i].token_ids for i in range(4)] == [answer.token_ids for answer in alone]


# ---- load ----------------------------------------------------------------------------------------------------------


def test_loading_a_path_opens_no_socket(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("network"))
    for path in (small_folder, str(small_folder), small_folder / "model.safetensors"):
        assert florence2.load(path).model.dtype == torch.float32


def test_types_and_attention(small_folder: Path, picture: Image.Image) -> None:
    eager = florence2.load(small_folder, attention="eager")
    fused = florence2.load(small_folder, dtype="float32")
    options = fused.options(**SHORT)
    assert (
        eager.run("<OD>", picture, options=options).token_ids == fused.run("<OD>", picture, options=options).token_ids
    )
    half = florence2.load(small_folder, dtype=torch.bfloat16, device="cpu")
    assert half.model.dtype == torch.bfloat16 and half.run("<OD>", picture, options=options).token_ids[0] == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention": "flash"}, "attention is 'flash'; it must be one of sdpa, eager"),
        ({"attention": None}, "attention is None; it must be one of sdpa, eager"),
        ({"parts": "decoder"}, "parts is 'decoder'; it must be one of all, encoder, vision"),
        ({"device": "gpu"}, "'gpu' cannot be used here.* Choose auto, cpu, cuda, cuda:N or mps"),
        ({"device": None}, "'None' cannot be used here"),
        ({"device": "meta"}, "'meta' cannot be used here"),
        ({"dtype": "int8"}, "int8 is not supported; choose one of auto, float32, float16, bfloat16"),
        ({"dtype": None}, "None is not supported"),
    ],
)
def test_wrong_settings_are_refused_before_a_file_is_read(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, where in (("resolve", loading), ("read_config", checkpoint), ("find_weights", checkpoint)):
        monkeypatch.setattr(where, name, lambda *_: pytest.fail("a file was read"))
    with pytest.raises(OptionError, match=words):
        florence2.load("nano", **settings)
    with pytest.raises(OptionError, match=words):
        load_model(Path("anywhere"), **settings)


def test_a_part_of_the_model(small_folder: Path, small: florence2.Florence2, picture: Image.Image) -> None:
    """The values are those of the whole model, and whatever needs the rest says what is missing."""
    encoder, vision = (florence2.load(small_folder, parts=parts) for parts in ("encoder", "vision"))
    whole = small.encode_image(picture)
    for f in (encoder, vision):
        encoded = f.encode_image(picture)
        assert torch.equal(encoded.features, whole.features) and encoded.size == whole.size
        for ask in (f.caption, f.cascade, lambda image, f=f: f.run_batch([("<OD>", image)])):
            with pytest.raises(Florence2Error, match=r'loaded with parts="\w+"; load it with parts="all"'):
                ask(picture)
    ids = torch.tensor([small.processor.prompt("<OD>")])
    memory = small.model.encode(whole.features, ids)
    assert torch.equal(encoder.model.encode(whole.features, ids), memory)
    for f, parts in ((encoder, "encoder"), (vision, "vision")):
        assert f', parts="{parts}", ' in repr(f) and repr(f).endswith("M parameters, cpu, float32)")
    with pytest.raises(Florence2Error, match='language model is missing.*parts="vision"'):
        vision.model.encode(whole.features, ids)
    for use in (
        lambda: encoder.model.decode(ids, memory),
        lambda: encoder.model.step(ids, encoder.model.start_cache(memory, 1, 5)),
        lambda: florence2.generate(encoder.model, memory, small.options()),
        lambda: encoder.model.loss(torch.zeros(1, 3, 160, 224), ids, ids),
        lambda: encoder.model.language_model.decoder.layers,
    ):
        with pytest.raises(Florence2Error, match='text decoder is missing.*parts="encoder"'):
            use()
    with pytest.raises(Florence2Error, match="output bias is missing"):
        encoder.model.final_logits_bias[0]


def test_a_part_of_the_model_takes_no_adapter(small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match='An adapter needs the whole model, but parts is "encoder"'):
        florence2.load(small_folder, parts="encoder", adapter=tmp_path)


def test_generation_settings_come_from_the_checkpoint(small_folder: Path, native_folder: Path, tmp_path: Path) -> None:
    expected = florence2.GenerationOptions()
    assert florence2.load(small_folder).options() == expected == florence2.load(native_folder).options()
    for source, name in ((small_folder, "config.json"), (native_folder, "generation_config.json")):
        copy = tmp_path / name
        shutil.copytree(source, copy)
        values = json.loads((copy / name).read_text())
        values.get("text_config", values)["num_beams"] = 5
        (copy / name).write_text(json.dumps(values))
        assert florence2.load(copy).options().num_beams == 5
        values.get("text_config", values)["num_beams"] = "many"
        (copy / name).write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match="own generation settings"):
            florence2.load(copy)


def test_a_tokenizer_of_another_model_is_refused(small_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c"
    shutil.copytree(small_folder, copy)
    values = json.loads((copy / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 51289, "content": "<mine>"})
    (copy / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="51290 tokens, but the model 51289"):
        florence2.load(copy)


@pytest.mark.parametrize("name", ["no/such/path", "missing.safetensors", "/absent", "", "owner/"])
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(HubError, match="not an existing path"):
        florence2.load(name)


def test_all_errors_are_one_family() -> None:
    assert issubclass(HubError, Florence2Error) and issubclass(Florence2Error, ValueError)


def test_requests_beyond_one_batch(
    small: florence2.Florence2, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture is encoded once for all requests, and every request is looked at before the first is answered."""
    encodings = count_encodings(small, monkeypatch)
    options = small.options(max_new_tokens=2)
    answers = small.run_batch([("<OD>", picture)] * 5, options=options, batch_size=2)
    assert len(answers) == 5 and len(encodings) == 1
    with pytest.raises(PromptError):
        small.run_batch([*[("<OD>", picture)] * 9, ("<REGION_TO_OCR>", picture, "x")], options=options, batch_size=2)
    assert len(encodings) == 1
    for bad in (("<OD>",), "<OD>", ("<OD>", picture, None, 1)):
        with pytest.raises(PromptError, match=r"must be \(task, image\)"):
            small.run_batch([bad])  # type: ignore[list-item]
    for none in (5, None, "<OD>"):
        with pytest.raises(PromptError, match=r"give a list of \(task, image\)"):
            small.run_batch(none)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="takes no box"):
        small.run("<CAPTION_TO_PHRASE_GROUNDING>", picture, (1, 2, 3, 4))
    with pytest.raises(PromptError, match="class is empty"):
        small.run("<OPEN_VOCABULARY_DETECTION>", picture, ["a", ""])


@pytest.mark.parametrize("attention", keep([0], ["sdpa", "eager"]))
def test_half_precision_holds_the_sums_of_a_large_picture(
    attention: Any, tmp_path_factory: pytest.TempPathFactory, picture: Image.Image
) -> None:
    """Over 36,864 positions the products of the first stage's channels leave float16 unless they are scaled first."""
    shape = shapes()[0]
    model = Florence2Model(shape.config, attention).eval()
    model.load_state_dict(make_model(shape.config, shape.seed, shape.end_bonus).state_dict())
    with torch.no_grad():
        pixels = torch.randn(1, 3, 768, 768)
        single, half = model.encode_image(pixels), model.half().encode_image(pixels)
    assert half.isfinite().all() and float((single - half.float()).abs().max()) < 0.2


def test_values_that_are_not_finite_get_a_sentence(small: florence2.Florence2, picture: Image.Image) -> None:
    encoded = small.encode_image(picture)
    with pytest.raises(Florence2Error, match="not finite"):
        small.run("<OD>", replace(encoded, features=encoded.features * float("nan")))


def test_encoded_pictures_go_where_the_model_is(small: florence2.Florence2, picture: Image.Image) -> None:
    encoded = small.encode_image(picture)
    double = replace(encoded, features=encoded.features.double())
    options = small.options(max_new_tokens=4)
    assert small.run("<OD>", double, options=options).token_ids == small.run("<OD>", encoded, options=options).token_ids
    assert encoded != double and encoded == encoded


def test_a_tokenizer_that_lacks_a_token_is_refused(small_folder: Path, native_folder: Path, tmp_path: Path) -> None:
    """All location tokens would be shifted by one."""
    for source in (small_folder, native_folder):
        copy = tmp_path / source.name
        shutil.copytree(source, copy)
        values = json.loads((copy / "tokenizer.json").read_text())
        vocabulary = values["model"]["vocab"]
        del vocabulary[max(vocabulary, key=vocabulary.get)]
        values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < 50264]
        (copy / "tokenizer.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match="lacks the token '<mask>'"):
            florence2.load(copy)


def test_a_path_has_no_revision(small_folder: Path) -> None:
    with pytest.raises(HubError, match="and has no revisions"):
        florence2.load(small_folder, revision="main")
