"""Labelled shapes drawn on a picture, with Pillow alone."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, float]]
Colour = tuple[int, int, int]

_GOLDEN = 0.618033988749895  # steps of the golden ratio around the colour wheel keep neighbours far apart
_FILL_ALPHA = 96  # of 255


@dataclass(frozen=True)
class Shape:
    """A closed outline in pixels. Equal labels get equal colours; `filled` shapes are tinted inside.

    `titled` says whether the label is also written.
    """

    points: Points
    label: str = ""
    filled: bool = False
    titled: bool = True


def draw_shapes(image: Image.Image, shapes: Sequence[Shape]) -> Image.Image:
    """A copy of `image` in RGB with every shape's outline, then every label on top.

    Line width and letters grow with the picture. A label stands above its shape's top left corner, moved down where
    another label is in the way, and never leaves the picture.
    """
    canvas = image.convert("RGB").copy()
    thickness = max(1, round(min(canvas.size) / 250))
    colours = _colours([shape.label for shape in shapes])
    visible = [shape for shape in shapes if len(shape.points) > 1]
    for shape in visible:
        _draw_outline(canvas, shape, colours[shape.label], thickness)
    font = ImageFont.load_default(max(11, round(min(canvas.size) / 40)))
    taken: list[tuple[float, float, float, float]] = []
    for shape in visible:
        if shape.label and shape.titled:
            taken.append(_draw_label(canvas, shape, colours[shape.label], font, taken))
    return canvas


def _colours(labels: Sequence[str]) -> dict[str, Colour]:
    """One colour per distinct label, in the order of first appearance."""
    colours: dict[str, Colour] = {}
    for label in labels:
        hue = (len(colours) * _GOLDEN) % 1.0
        r, g, b = colorsys.hsv_to_rgb(hue, 0.85, 0.95)
        colours.setdefault(label, (round(255 * r), round(255 * g), round(255 * b)))
    return colours


def _draw_outline(canvas: Image.Image, shape: Shape, colour: Colour, thickness: int) -> None:
    points = [(x, y) for x, y in shape.points]
    if shape.filled and len(points) > 2:
        mask = Image.new("L", canvas.size)
        ImageDraw.Draw(mask).polygon(points, fill=_FILL_ALPHA)
        canvas.paste(colour, (0, 0, *canvas.size), mask)
    ImageDraw.Draw(canvas).line([*points, points[0]], fill=colour, width=thickness, joint="curve")


def _draw_label(
    canvas: Image.Image,
    shape: Shape,
    colour: Colour,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Write the label on a plate of the shape's colour; return the plate's rectangle."""
    draw = ImageDraw.Draw(canvas)
    text = " ".join(shape.label.split())
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(2, round((bottom - top) / 5))
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = min(point[0] for point in shape.points)
    y = min(point[1] for point in shape.points) - height
    x = max(0.0, min(x, canvas.width - width))
    y = max(0.0, min(y, canvas.height - height))
    while any(x < b[2] and b[0] < x + width and y < b[3] and b[1] < y + height for b in taken):
        if y + 2 * height > canvas.height:  # no room below: let it overlap rather than vanish
            break
        y += height
    plate = (x, y, x + width, y + height)
    draw.rectangle(plate, fill=colour)
    brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = (0, 0, 0) if brightness > 140 else (255, 255, 255)
    draw.text((x + pad - left, y + pad - top), text, fill=ink, font=font)
    return plate
