"""Requests: every wrong type gets a sentence, boxes come in many forms, transparency gets its colour."""

import io
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import florence2
from florence2.answers.answer import Box
from florence2.asking.requests import EncodedImage, PreparedImage, check_request, check_requests, outline_requests
from florence2.errors import Florence2Error, ImageError, OptionError, PromptError
from florence2.inputs.coordinates import box_to_tokens, pixels_to_bins

REGION = "<REGION_TO_OCR>"
BOX = (10, 20, 200, 150)


@pytest.fixture(scope="module")
def encoded(small: florence2.Florence2) -> EncodedImage:
    return small.encode_image(np.zeros((200, 320, 3), np.uint8))


def test_the_repr_of_an_image_holds_neither_pixels_nor_source() -> None:
    assert repr(PreparedImage(np.zeros((3, 4, 3), np.uint8), (4, 3), "a.png")) == "PreparedImage(size=(4, 3))"
    assert repr(EncodedImage(None, (4, 3), "a.png")) == "EncodedImage(features=None, size=(4, 3))"


@pytest.mark.parametrize("request_", [["<OD>", "a.png"], ("<OD>",), ("<OD>", "a.png", "x", None), "od", None])
def test_a_request_is_a_tuple_of_two_or_three(request_: Any) -> None:
    with pytest.raises(PromptError, match=r"A request must be \(task, image\) or \(task, image, input\), not"):
        check_request(request_)


@pytest.mark.parametrize(
    ("xyxy", "tokens"),
    [
        ((10.0, 20.0, 10.0, 20.0), "<loc_100><loc_200><loc_100><loc_200>"),
        ((10.0, 20.0, 30.0, 40.0), "<loc_100><loc_200><loc_300><loc_400>"),
        ((30.0, 20.0, 10.0, 40.0), None),
        ((10.0, 40.0, 30.0, 20.0), None),
    ],
)
def test_boxes_with_swapped_corners_are_not_outlined(xyxy: tuple[float, ...], tokens: str | None) -> None:
    image = EncodedImage(None, (100, 100))
    requests, problems = outline_requests(image, [Box((0.0, 0.0, 9.0, 9.0), "a"), Box(xyxy, "b")])
    assert requests.get(1) == (None if tokens is None else ("<REGION_TO_SEGMENTATION>", image, tokens))
    assert problems == ["The box of 'b' has swapped corners, so it was not outlined."] * (tokens is None)


@pytest.mark.parametrize(
    "box",
    [
        list(BOX),
        np.array(BOX),
        np.float32(BOX),
        torch.tensor(BOX),
        torch.tensor(BOX, dtype=torch.bfloat16).float(),
        torch.tensor(BOX, dtype=torch.float64, requires_grad=True),
        [torch.tensor(10), np.float32(20), 200.0, Fraction(150)],
        (value for value in BOX),
    ],
)
def test_forms_of_a_box(box: Any, encoded: EncodedImage) -> None:
    request = check_request((REGION, encoded, box))
    assert request.box == BOX
    assert request.sentence((320, 200)) == "What text is in the region <loc_31><loc_100><loc_625><loc_750>?"


@pytest.mark.parametrize(
    "box",
    [
        5,
        10**400,
        (0, 0, 10**400, 10**400),
        b"\1\2\3\4",
        bytearray(4),
        memoryview(b"abcd"),
        {1, 2, 3, 4},
        {1: 1, 2: 2, 3: 3, 4: 4},
        (True, True, True, True),
        (None,) * 4,
        (1j, 2, 3, 4),
        (1, 2, 3),
        [0] * 100_000,
        [],
        np.array(5),
        torch.tensor(5.0),
        object(),
        len,
        (float("nan"), 1, 2, 3),
        (0, 0, float("inf"), 1),
    ],
)
def test_what_is_not_a_box(box: Any, small: florence2.Florence2, encoded: EncodedImage) -> None:
    asks: list[Callable[[], object]] = [
        lambda: small.run(REGION, encoded, box=box),
        lambda: small.run(REGION, encoded, box),
        lambda: small.run_batch([(REGION, encoded, box)]),
        lambda: small.describe(encoded, box),
    ]
    for ask in asks:
        with pytest.raises(PromptError) as raised:
            ask()
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "box", [torch.zeros(4, device="meta"), [*torch.zeros(4, device="meta")], torch.tensor(BOX).to_sparse()]
)
def test_a_box_whose_values_cannot_be_read(box: Any, small: florence2.Florence2, encoded: EncodedImage) -> None:
    asks: list[Callable[[], object]] = [
        lambda: small.run(REGION, encoded, box=box),
        lambda: small.run_batch([(REGION, encoded, box)]),
        lambda: small.detect(encoded, box),
        lambda: small.processor.prompt(REGION, box, (320, 200)),
    ]
    for ask in asks:
        with pytest.raises(PromptError, match=r"A (Tensor|list) cannot be read as a task's input: .* holds values\.$"):
            ask()


@pytest.mark.parametrize("use", [box_to_tokens, pixels_to_bins])
def test_coordinates_without_values(use: Callable[..., object]) -> None:
    with pytest.raises(PromptError, match="must be"):
        use(torch.zeros(4, device="meta"), (320, 200))


def test_numbers_of_numpy_are_numbers(small: florence2.Florence2, encoded: EncodedImage) -> None:
    few: dict[str, Any] = {"max_new_tokens": np.int64(2), "num_beams": torch.tensor(1)}
    batch = small.run_batch([("<OD>", encoded)] * 2, batch_size=np.int64(2), **few)  # type: ignore[arg-type]
    assert batch[0].token_ids == small.run("<OD>", encoded, max_new_tokens=2, num_beams=1).token_ids
    with pytest.raises(OptionError, match="batch_size is"):
        small.run_batch([], batch_size=np.float64(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("boxes", [[BOX, BOX], [BOX], np.array([BOX] * 3), torch.tensor([BOX])])
def test_several_boxes_are_several_requests(boxes: Any, small: florence2.Florence2, encoded: EncodedImage) -> None:
    with pytest.raises(
        PromptError, match=r"Ask about each box with f.run_batch\(\[\(task, image, box\) for box in boxes"
    ):
        small.run(REGION, encoded, box=boxes)


def test_a_box_beyond_the_image_is_measured_against_the_image(
    small: florence2.Florence2, encoded: EncodedImage
) -> None:
    with pytest.raises(PromptError, match="outside the image of 320 x 200"):
        small.run(REGION, encoded, box=(3e9, 0, 4e9, 5))


@pytest.mark.parametrize(
    "requests", [None, 5, "<OD>", b"x", {("<OD>", "x.png")}, {"<OD>": "x.png"}, frozenset(), [5], [("<OD>",)]]
)
def test_what_is_not_a_list_of_requests(requests: Any) -> None:
    with pytest.raises(PromptError, match="request"):
        check_requests(requests)


def test_a_generator_of_requests(small: florence2.Florence2, encoded: EncodedImage) -> None:
    few = small.options(max_new_tokens=2, num_beams=1)
    assert len(small.run_batch((("<OD>", encoded) for _ in range(2)), options=few)) == 2


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda f, e: f.run_batch([("<OD>", e)], batch_size="8"), OptionError),
        (lambda f, e: f.run_batch([("<OD>", e)], batch_size=2.0), OptionError),
        (lambda f, e: f.run("<OD>", e, options=5), OptionError),
        (lambda f, e: f.run("<OD>", e, options={"num_beams": 1}), OptionError),
        (lambda f, e: f.run("<OD>", e, num_beams="3"), OptionError),
        (lambda f, e: f.caption(e, ["short"]), PromptError),
        (lambda f, e: f.cascade(e, {}), PromptError),
        (lambda f, e: f.detect(e, np.array("x")), PromptError),
        (lambda f, e: f.detect(e, [b"cat"]), PromptError),
        (lambda f, e: f.detect(e, b"cat"), PromptError),
        (lambda f, e: f.detect(e, {}), PromptError),
        (lambda f, e: f.ground(e, 5), PromptError),
        (lambda f, e: f.run(5, e), PromptError),
        (lambda f, e: f.run("<OD>", 5), ImageError),
        (lambda f, e: f.run("<OD>", ""), ImageError),
        (lambda f, e: f.run("<OD>", io.StringIO("x")), ImageError),
        (lambda f, e: f.processor.answer("<OD>", token_ids=["x"], image_size=(5, 5)), PromptError),
        (lambda f, e: f.processor.answer("<OD>", token_ids=[[2]], image_size=(5, 5)), PromptError),
        (lambda f, e: f.processor.answer("<OD>", token_ids=[2.5], image_size=(5, 5)), PromptError),
        (lambda f, e: f.processor.answer("<OD>", token_ids=5, image_size=(5, 5)), PromptError),
        (
            lambda f, e: f.processor.answer("<OD>", token_ids=[2, 0], token_logprobs=["x"], image_size=(5, 5)),
            PromptError,
        ),
        (lambda f, e: f.processor.answer("<OD>", "x", image_size=5), PromptError),
        (lambda f, e: f.processor.answer("<OD>", 5, image_size=(5, 5)), PromptError),
        (lambda f, e: f.processor.answer(5, "x", image_size=(5, 5)), PromptError),
        (lambda f, e: f.processor.prompt(5), PromptError),
        (lambda f, e: f.processor.encode(5), PromptError),
    ],
)
def test_wrong_types_get_a_sentence(
    call: Callable[[Any, Any], object], kind: type[Florence2Error], small: florence2.Florence2, encoded: EncodedImage
) -> None:
    with pytest.raises(kind):
        call(small, encoded)


def test_a_free_prompt_of_one_word(small: florence2.Florence2, encoded: EncodedImage) -> None:
    few = small.options(max_new_tokens=2, num_beams=1)
    with pytest.raises(PromptError, match="did you mean od"):
        small.run("detect", encoded, options=few)
    for prompt in ("detect", "<OD>"):
        answer = small.run(florence2.FreePrompt(prompt), encoded, options=few)
        assert (answer.task, answer.kind) == (prompt, "text")
        (again,) = small.run_batch([(florence2.FreePrompt(prompt), encoded)], options=few)
        assert again.token_ids == answer.token_ids
    request = check_request((florence2.FreePrompt("<OD>"), encoded))
    assert request.sentence((5, 5)) == "<OD>"


def test_backgrounds(small: florence2.Florence2) -> None:
    """In every way that an image comes in: of a call, of `load`, of a processor."""
    logo = Image.new("RGBA", (64, 48))  # transparent black
    white, black = Image.new("RGB", (64, 48), "white"), Image.new("RGB", (64, 48))
    few = small.options(max_new_tokens=3, num_beams=1)
    on_white = florence2.Florence2(small.model, small.processor.changed(background="white"))
    assert torch.equal(small.processor.image(logo), small.processor.image(black))
    for pixels in (
        small.processor.image(logo, "white"),
        on_white.processor.image(logo),
        small.pixel_values([small.prepare_image(logo, "white")]),
        on_white.pixel_values([on_white.prepare_image(logo)]),
    ):
        assert torch.equal(pixels, small.processor.image(white))
    assert torch.equal(on_white.processor.image(logo, "black"), small.processor.image(black))
    right = small.run("<CAPTION>", white, options=few)
    for answer in (
        small.run("<CAPTION>", logo, background="white", options=few),
        on_white.run("<CAPTION>", logo, options=few),
        small.caption(logo, background=(255, 255, 255), options=few),
        small.run_batch([("<CAPTION>", logo)], background="#fff", options=few)[0],
        small.cascade(logo, background="white", options=few).caption,
    ):
        assert answer.token_logprobs == right.token_logprobs
    assert small.run("<CAPTION>", logo, options=few).token_logprobs != right.token_logprobs


def test_backgrounds_that_cannot_be_used(small: florence2.Florence2, encoded: EncodedImage) -> None:
    for call in (small.caption, small.cascade):
        with pytest.raises(OptionError, match="background has no effect on an EncodedImage"):
            call(encoded, background="white")
        with pytest.raises(OptionError, match="must be a colour"):
            call(np.zeros((5, 5, 3), np.uint8), background="no colour")


def test_a_background_is_checked_before_anything_is_read() -> None:
    with pytest.raises(OptionError, match="background is 5; it must be a colour"):
        florence2.load("no/such/model", background=5)  # type: ignore[arg-type]


def test_models_in_float64_answer_as_those_in_float32(small_folder: Any, encoded: EncodedImage) -> None:
    """Also where float64 is torch's default type."""
    f = florence2.load(small_folder)
    searches: list[dict[str, Any]] = [{"num_beams": 3}, {"num_beams": 1}, {"sample": True, "seed": 4}]
    expected = [f.run("<OD>", encoded, max_new_tokens=6, **search).token_ids for search in searches]
    torch.set_default_dtype(torch.float64)
    try:
        for model in (f, florence2.load(small_folder)):
            assert [model.run("<OD>", encoded, max_new_tokens=6, **search).token_ids for search in searches] == expected
    finally:
        torch.set_default_dtype(torch.float32)
    f.model.double()
    assert [f.run("<OD>", encoded, max_new_tokens=6, **search).token_ids for search in searches] == expected
