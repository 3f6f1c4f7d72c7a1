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


def test_more_labels_than_fit_overlap_inside_the_image(white: Image.Image) -> None:
    """The column below the shape fills up to the lower edge; later labels are written over earlier ones there."""
    few, many = ([Shape(SQUARE, f"label {i}") for i in range(count)] for count in (3, 40))
    plain = draw_shapes(white, [Shape(SQUARE, shape.label, titled=False) for shape in many])
    rows = [
        {y for y in range(120) if any(drawn.getpixel((x, y)) != plain.getpixel((x, y)) for x in range(200))}
        for drawn in (draw_shapes(white, few), draw_shapes(white, many))
    ]
    assert max(rows[0]) < 90 and max(rows[1]) > 100 and rows[0] <= rows[1]


def test_outlines_beyond_the_image_are_cut_at_its_edge(white: Image.Image) -> None:
    drawn = draw_shapes(white, [Shape([(-50.0, -50.0), (500.0, 500.0), (0.0, 300.0)], filled=True)])
    assert is_coloured(drawn, 20, 20) and is_coloured(drawn, 60, 60)  # the edge from corner to corner
    assert is_coloured(drawn, 10, 100) and not is_coloured(drawn, 150, 20)  # the inside below it, and above it nothing


@pytest.mark.parametrize("points", [[], [(5.0, 5.0)]])
def test_a_shape_of_less_than_two_points_is_not_drawn(points: list[tuple[float, float]], white: Image.Image) -> None:
    assert draw_shapes(white, [Shape(points, "a label", filled=True)]).tobytes() == white.tobytes()


def test_a_shape_of_two_points_is_a_line(white: Image.Image) -> None:
    drawn = draw_shapes(white, [Shape([(60.0, 70.0), (20.0, 30.0)], filled=True)])
    assert is_coloured(drawn, 40, 50) and not is_coloured(drawn, 30, 60) and not is_coloured(drawn, 50, 40)


def test_a_label_of_two_lines_is_written_as_one(white: Image.Image) -> None:
    one, two = (draw_shapes(white, [Shape(SQUARE, label)]) for label in ("line break", "line\n break"))
    assert one.tobytes() == two.tobytes()


def test_a_confidence_is_written_after_the_label(white: Image.Image) -> None:
    drawn = draw_shapes(white, [Shape(SQUARE, "car", 0.8449)])
    assert drawn.tobytes() != draw_shapes(white, [Shape(SQUARE, "car")]).tobytes()
    assert Shape(SQUARE, "car", 0.8449).title == "car 0.84" and Shape(SQUARE, "", 0.5).title == "0.50"
    assert Shape(SQUARE, "car", 0.5, titled=False).title == ""


def test_tiny_and_grey_images() -> None:
    """A label that is larger than the image covers it."""
    tiny = draw_shapes(Image.new("L", (1, 1)), [Shape(SQUARE, "x")])
    assert (tiny.mode, tiny.size) == ("RGB", (1, 1)) and tiny.getpixel((0, 0)) != (0, 0, 0)
    grey = draw_shapes(Image.new("L", (200, 120), 255), [Shape(SQUARE)])
    assert is_coloured(grey, 20, 50) and not is_coloured(grey, 40, 50)


def test_a_note_stays_in_the_lower_left_corner(white: Image.Image) -> None:
    drawn = draw_shapes(white, [Shape(SQUARE)], note="cut off")
    without = draw_shapes(white, [Shape(SQUARE)])
    left, top, right, bottom = ImageChops.difference(drawn, without).getbbox()
    assert left < 10 and right < 100 and top > 90 and bottom <= 120


def test_letters_that_no_font_has() -> None:
    """Pillow's own font lacks accents and other scripts: there the plain letter is written, or a question mark."""
    own = ImageFont.load_default(14)
    assert _choose_font("über 日", [own]) == ("uber ?", own)
    assert _choose_font("cup", [own]) == ("cup", own)
