"""A caption, its phrases grounded, each box outlined."""

from typing import Any

import pytest
from PIL import Image

import florence2


def test_cascade(small: florence2.Florence2, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain by hand: the caption's text is grounded, and every box is outlined under its phrase."""
    locations = "".join(f"<loc_{bin}>" for bin in (100, 200, 300, 400))
    size = picture.size
    grounding = small.processor.answer(
        "<CAPTION_TO_PHRASE_GROUNDING>", f"a car{locations}a dog{locations}{locations}", image_size=size
    )
    outline = small.processor.answer("<REGION_TO_SEGMENTATION>", locations + locations, image_size=size)
    described = small.processor.answer("<CAPTION>", "</s><s>a car and two dogs</s>", image_size=size)
    canned = {answer.task: answer for answer in (described, grounding, outline)}
    requested: list[tuple[Any, ...]] = []

    def run_batch(requests: Any, **_: Any) -> list[florence2.Answer]:
        requested.extend((request[0], request[2]) for request in requests)
        return [canned[request[0]] for request in requests]

    monkeypatch.setattr(small, "run_batch", run_batch)
    monkeypatch.setattr(small, "run", lambda task, image, text=None, **_: run_batch([(task, image, text)])[0])
    cascade = small.cascade(picture)
    assert (
        requested
        == [("<CAPTION>", None), ("<CAPTION_TO_PHRASE_GROUNDING>", "a car and two dogs")]
        + [("<REGION_TO_SEGMENTATION>", locations)] * 3
    )
    assert [segment.polygons[0].label for segment in cascade.segments] == ["a car", "a dog", "a dog"]
    assert cascade.to_dict()["segments"][2]["polygons"][0]["label"] == "a dog"
    assert cascade.draw(picture).size == size and "a car" in str(cascade)


def test_a_cascade_of_nothing(small: florence2.Florence2, picture: Image.Image) -> None:
    empty = small.cascade(picture, options=small.options(max_new_tokens=1))
    assert empty.caption.text == "" and empty.grounding.boxes == () and empty.segments == ()


LOCATIONS = "<loc_100><loc_200><loc_300><loc_400>"
SWAPPED = "<loc_300><loc_200><loc_100><loc_400>"
UPSIDE_DOWN = "<loc_100><loc_400><loc_300><loc_200>"


def with_canned(
    small: florence2.Florence2, monkeypatch: pytest.MonkeyPatch, caption: str, grounding: str | None = None
) -> None:
    """Let the model write a caption of our own, and, if it is given, its grounding."""
    original = small.run

    def run(task: str, image: Any, text: Any = None, **settings: Any) -> florence2.Answer:
        if task == "<CAPTION>":
            return small.processor.answer(task, f"</s><s>{caption}</s>", image_size=image.size)
        if grounding is not None and task == "<CAPTION_TO_PHRASE_GROUNDING>":
            return small.processor.answer(task, f"</s><s>{grounding}</s>", image_size=image.size)
        return original(task, image, text, **settings)

    monkeypatch.setattr(small, "run", run)


def test_a_caption_that_is_too_long_to_be_grounded_is_kept(
    small: florence2.Florence2, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_canned(small, monkeypatch, "a cup and " * 1000 + "a dog")
    cascade = small.cascade(picture, max_new_tokens=3)
    assert cascade.caption.text.endswith("a dog") and cascade.boxes == () and cascade.segments == ()
    (reason,) = cascade.missing
    assert reason.startswith("The caption could not be grounded, so it stands alone: ") and "positions" in reason
    assert str(cascade).splitlines() == [cascade.caption.text, reason]
    assert cascade.to_dict()["missing"] == [reason] and cascade.draw(picture).size == picture.size


def test_a_box_with_swapped_corners_leaves_its_outline_out_alone(
    small: florence2.Florence2, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    phrases = f"a car{SWAPPED}a dog{LOCATIONS}a cat{UPSIDE_DOWN}"
    with_canned(small, monkeypatch, "a car, a dog, a cat", phrases)
    cascade = small.cascade(picture, max_new_tokens=3)
    assert [box.label for box in cascade.boxes] == ["a car", "a dog", "a cat"] and len(cascade.segments) == 3
    assert [bool(segment.raw_text) for segment in cascade.segments] == [False, True, False]
    assert cascade.missing == (
        "The box of 'a car' has swapped corners, so it was not outlined.",
        "The box of 'a cat' has swapped corners, so it was not outlined.",
    )
    assert str(cascade).splitlines()[-2:] == list(cascade.missing) and cascade.draw(picture).size == picture.size


def test_a_box_without_an_area_is_outlined(
    small: florence2.Florence2, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_canned(small, monkeypatch, "a dot", "a dot<loc_5><loc_6><loc_5><loc_6>")
    cascade = small.cascade(picture, max_new_tokens=3)
    assert cascade.missing == () and cascade.segments[0].raw_text and "missing" not in cascade.to_dict()
