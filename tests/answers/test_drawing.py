"""Shapes on an image."""

import pytest
from PIL import Image, ImageFont

from florence2.answers.drawing import Shape, _choose_font, draw_shapes

SQUARE = [(20.0, 30.0), (60.0, 30.0), (60.0, 70.0), (20.0, 70.0)]


@pytest.fixture
def white() -> Image.Image:
    return Image.new("RGB", (200, 120), "white")


def is_coloured(image: Image.Image, x: int, y: int) -> bool:
    return image.getpixel((x, y)) != (255, 255, 255)


def test_outlines_and_fills(white: Image.Image) -> None:
    outline, filled = draw_shapes(white, [Shape(SQUARE)]), draw_shapes(white, [Shape(SQUARE, filled=True)])
    for drawn in (outline, filled):
        assert all(is_coloured(drawn, x, y) for x, y in ((20, 50), (60, 50), (40, 30), (40, 70)))
        assert not is_coloured(drawn, 100, 100)
    assert not is_coloured(outline, 40, 50) and is_coloured(filled, 40, 50)


def test_equal_labels_share_a_colour_and_different_ones_do_not(white: Image.Image) -> None:
    right = [(x + 80, y) for x, y in SQUARE]
    same = draw_shapes(white, [Shape(SQUARE, "a", titled=False), Shape(right, "a", titled=False)])
    other = draw_shapes(white, [Shape(SQUARE, "a", titled=False), Shape(right, "b", titled=False)])
    assert same.getpixel((20, 50)) == same.getpixel((100, 50))
    assert other.getpixel((20, 50)) != other.getpixel((100, 50))


def test_labels_stay_inside_and_do_not_cover_each_other(white: Image.Image) -> None:
    corner = [(190.0, 0.0), (199.0, 0.0), (199.0, 10.0)]

    def plates(labels: list[str]) -> set[tuple[int, int]]:
        with_labels = draw_shapes(white, [Shape(corner, label) for label in labels])
        without = draw_shapes(white, [Shape(corner, label, titled=False) for label in labels])
        places = [(x, y) for x in range(200) for y in range(120)]
        return {place for place in places if with_labels.getpixel(place) != without.getpixel(place)}

    one, two = plates(["a label"]), plates(["a label", "another one"])
    assert min(x for x, _ in one) > 100  # moved left of the corner, whole
    assert len({y for _, y in two}) > 1.8 * len({y for _, y in one})  # one below the other


def test_more_labels_than_fit_end_somewhere(white: Image.Image) -> None:
    draw_shapes(white, [Shape(SQUARE, f"label {i}") for i in range(40)])


def test_coordinates_outside_and_degenerate_shapes(white: Image.Image) -> None:
    shapes = [
        Shape([(-50.0, -50.0), (500.0, 500.0), (0.0, 300.0)], "far", filled=True),
        Shape([(5.0, 5.0)], "a point"),
        Shape([], "nothing"),
        Shape([(60.0, 70.0), (20.0, 30.0)], "line\nbreak", filled=True),
    ]
    assert draw_shapes(white, shapes).size == white.size


def test_tiny_and_grey_images() -> None:
    assert draw_shapes(Image.new("L", (1, 1)), [Shape(SQUARE, "x")]).mode == "RGB"


def test_letters_that_no_font_has() -> None:
    """Pillow's own font lacks accents and other scripts: there the plain letter is written, or a question mark."""
    own = ImageFont.load_default(14)
    assert _choose_font("über 日", [own]) == ("uber ?", own)
    assert _choose_font("cup", [own]) == ("cup", own)
