"""Answers in a notebook: one short line, a drawing, or HTML."""

import copy
import gc
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from florence2.answers.answer import Answer, image_reference, parse_answer
from florence2.answers.notebook import MAX_SIDE
from parity.recipe import make_picture

SIZE = (200, 120)
BOX = "<loc_100><loc_200><loc_300><loc_400>"


@pytest.fixture
def image() -> Image.Image:
    return make_picture(1, *SIZE)


def detection(source: Any = None, text: str = f"car{BOX}") -> Answer:
    return parse_answer("<OD>", "boxes", text, SIZE, image=image_reference(source))


def test_a_repr_is_one_short_line() -> None:
    assert repr(detection()) == "Answer('<OD>', boxes: 1 box, image 200 x 120)"
    assert repr(detection(text=f"car{BOX * 2}")) == "Answer('<OD>', boxes: 2 boxes, image 200 x 120)"
    assert repr(detection(text="")) == "Answer('<OD>', boxes: 0 boxes, image 200 x 120)"
    either = parse_answer("<X>", "boxes_or_polygons", f"cat<poly>{BOX}</poly>", SIZE)
    assert repr(either) == "Answer('<X>', boxes_or_polygons: 0 boxes, 1 polygon, image 200 x 120)"
    lines = repr(parse_answer("a\nlong " * 50, "text", "</s><s>A green\ncar " + "x" * 1000, SIZE))
    assert len(lines) < 200 and "\n" not in lines and "A green" in lines


def test_a_repr_has_neither_ids_nor_probabilities() -> None:
    scored = parse_answer(
        "<C>", "text", "cat", SIZE, token_ids=(2, 40399), token_logprobs=(-0.125,), token_texts=("</s>", "cat")
    )
    assert repr(scored) == "Answer('<C>', text: 'cat', image 200 x 120)"


def test_an_image_at_hand_is_drawn_on(image: Image.Image, tmp_path: Path) -> None:
    image.save(tmp_path / "image.png")
    array, tensor = np.array(image), torch.from_numpy(np.array(image))
    expected = detection().draw(image)
    for source in (image, array, tensor, tmp_path / "image.png", str(tmp_path / "image.png")):
        answer = detection(source)
        png = answer._repr_png_()
        assert png is not None and answer._repr_html_() is None
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(expected)), type(source)


def test_large_drawings_are_made_smaller() -> None:
    large = Image.new("RGB", (4000, 1000))
    answer = parse_answer("<OD>", "boxes", f"car{BOX}", large.size, image=image_reference(large))
    png = answer._repr_png_()
    assert png is not None and Image.open(io.BytesIO(png)).size == (MAX_SIDE, MAX_SIDE // 4)
    assert large.size == (4000, 1000)


def test_without_an_image_a_table_is_shown() -> None:
    answer = detection(text=f"a > b{BOX}")
    assert answer._repr_png_() is None
    table = answer._repr_html_() or ""
    assert table.startswith("<table>") and "<td>a &gt; b</td>" in table and "<td>20.1 24.1 60.1 48.1</td>" in table
    scored = replace(answer, boxes=(replace(answer.boxes[0], score=0.456),))
    assert "<td>0.46</td>" in (scored._repr_html_() or "")


def test_text_is_escaped_and_never_drawn(image: Image.Image) -> None:
    answer = parse_answer("<OCR>", "text", "</s><s><script>x</script></s>", SIZE, image=image_reference(image))
    assert answer._repr_png_() is None
    assert "&lt;script&gt;x&lt;/script&gt;" in (answer._repr_html_() or "")
    assert "(nothing found)" in (detection(image, text="")._repr_html_() or "")


def test_an_image_that_vanished_or_changed_gives_a_table(image: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    image.save(path)
    weak, gone = detection(image.copy()), detection(path)
    gc.collect()
    path.unlink()
    broken, other = detection(tmp_path / "broken.png"), detection(tmp_path / "other.png")
    (tmp_path / "broken.png").write_bytes(b"no")
    Image.new("RGB", (7, 7)).save(tmp_path / "other.png")
    closed_file = Image.open(tmp_path / "other.png")
    closed_file.close()
    for answer in (weak, gone, broken, other, detection(closed_file), detection(tmp_path)):
        assert answer._repr_png_() is None and (answer._repr_html_() or "").startswith("<table>"), answer.image


def test_only_paths_and_weak_references_are_kept(image: Image.Image, tmp_path: Path) -> None:
    for source in (b"bytes", bytearray(b"bytes"), io.BytesIO(b"bytes"), None, np.uint8(3), object()):
        assert image_reference(source) is None
    assert image_reference(str(tmp_path)) == tmp_path
    reference: Any = image_reference(image)
    assert reference() is image


def test_answers_can_be_pickled_and_copied(image: Image.Image, tmp_path: Path) -> None:
    for answer in (detection(image), detection(tmp_path / "a.png"), detection()):
        whole = replace(answer, alternatives=(answer,))
        for copied in (pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)):
            assert copied == whole and copied.boxes == whole.boxes
            assert copied.image == (whole.image if isinstance(whole.image, Path) else None)
            assert copied.alternatives[0].image == copied.image


def test_the_image_is_not_part_of_the_value(image: Image.Image, tmp_path: Path) -> None:
    plain = detection()
    for source in (image, tmp_path / "a.png"):
        answer = detection(source)
        assert answer == plain and hash(answer) == hash(plain) and repr(answer) == repr(plain)
        assert answer.to_dict(tokens=True) == plain.to_dict(tokens=True) and "image" not in json.loads(answer.to_json())
