"""Shapes on an image."""

import pytest
from PIL import Image, ImageChops, ImageFont

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


def test_more_labels_than_fit_overlap_at_the_bottom(white: Image.Image) -> None:
    """Every label is written inside the image, the last ones over one another."""
    few, many = (draw_shapes(white, [Shape(SQUARE, f"label {i}") for i in range(n)]) for n in (3, 40))
    last = draw_shapes(white, [Shape(SQUARE, f"label {i}") for i in range(41)])
    assert many.size == white.size and many.tobytes() != few.tobytes()
    changed = ImageChops.difference(many, last).getbbox()  # one label more, and one more outline over the others
    assert changed is not None and changed[3] > 100


def test_a_shape_partly_outside_is_drawn_where_it_is_inside(white: Image.Image) -> None:
    drawn = draw_shapes(white, [Shape([(-50.0, -50.0), (500.0, 500.0), (0.0, 300.0)], "far", filled=True)])
    assert drawn.size == white.size
    assert is_coloured(drawn, 100, 110) and not is_coloured(drawn, 150, 50)  # below and above the edge from -50 to 500


@pytest.mark.parametrize("points", [[], [(5.0, 5.0)]])
def test_a_shape_of_fewer_than_two_points_leaves_no_mark(white: Image.Image, points: list[tuple[float, float]]) -> None:
    assert draw_shapes(white, [Shape(points, "a point", filled=True)]).tobytes() == white.tobytes()


def test_a_shape_of_two_points_is_a_line_with_a_label_in_one_row(white: Image.Image) -> None:
    ends = [(60.0, 70.0), (20.0, 30.0)]
    broken, spaced = (draw_shapes(white, [Shape(ends, label, filled=True)]) for label in ("line\nbreak", "line break"))
    assert broken.tobytes() == spaced.tobytes()
    assert is_coloured(broken, 40, 50) and not is_coloured(broken, 55, 40)


def test_tiny_and_grey_images() -> None:
    dot = draw_shapes(Image.new("L", (1, 1), 255), [Shape([(0.0, 0.0), (9.0, 9.0)], "x", titled=False)])
    assert dot.mode == "RGB" and dot.size == (1, 1) and is_coloured(dot, 0, 0)
    assert draw_shapes(Image.new("L", (1, 1)), [Shape(SQUARE, "x")]).size == (1, 1)


def test_letters_that_no_font_has() -> None:
    """Pillow's own font lacks accents and other scripts: there the plain letter is written, or a question mark."""
    own = ImageFont.load_default(14)
    assert _choose_font("über 日", [own]) == ("uber ?", own)
    assert _choose_font("cup", [own]) == ("cup", own)
