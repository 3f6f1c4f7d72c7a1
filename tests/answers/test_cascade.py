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
