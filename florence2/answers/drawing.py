"""Draw labelled shapes on an image with Pillow."""

import colorsys
import contextlib
import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, float]]
Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_GOLDEN = 0.618033988749895  # steps of the golden ratio around the colour wheel keep successive hues far apart
_FILL_ALPHA = 96  # of 255
_SATURATION, _VALUE = 0.85, 0.95
_LINES_PER_SIDE, _LETTERS_PER_SIDE = 250, 40  # line widths and letter heights in the image's shorter side
_NOTE_COLOUR = (255, 255, 255)
_BRIGHT = 140  # of 255: on brighter colours black letters are easier to read than white ones
# Searched in the system's font folders. Fonts with more scripts come first.
_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "LiberationSans-Regular.ttf",
    "arial.ttf",
    "Arial.ttf",
)


@dataclass(frozen=True)
class Shape:
    """A closed outline in pixels.

    Equal labels have equal colours. The inside of a `filled` shape is tinted; the label of a `titled` one is written,
    with its confidence if it has one.
    """

    points: Points
    label: str = ""
    confidence: float | None = None
    filled: bool = False
    titled: bool = True

    @property
    def title(self) -> str:
        """The words next to it."""
        words = [*self.label.split(), *([] if self.confidence is None else [f"{self.confidence:.2f}"])]
        return " ".join(words) if self.titled else ""


def draw_shapes(image: Image.Image, shapes: Sequence[Shape], note: str | None = None) -> Image.Image:
    """Return an RGB copy of `image` with all outlines, all labels on top of them, and a note in the lower left corner.

    Line width and letter size are proportional to the image. A label is above its shape's top left corner, lower where
    another label is in the way, and always inside the image. A letter that no installed font has is written without
    its accent, or as "?".
    """
    canvas = image.convert("RGB").copy()
    thickness = max(1, round(min(canvas.size) / _LINES_PER_SIDE))
    colours = _colours([shape.label for shape in shapes])
    visible = [shape for shape in shapes if len(shape.points) > 1]
    for shape in visible:
        _draw_outline(canvas, shape, colours[shape.label], thickness)
    fonts = _fonts(max(11, round(min(canvas.size) / _LETTERS_PER_SIDE)))
    taken: list[tuple[float, float, float, float]] = []
    for shape in visible:
        if shape.title:
            text, font = _choose_font(shape.title, fonts)
            taken.append(_draw_label(canvas, shape.points, text, colours[shape.label], font, taken))
    if note is not None:
        text, font = _choose_font(note, fonts)
        below = [(0.0, 2.0 * canvas.height)]  # a plate stays inside the image, so this one is at its lower edge
        _draw_label(canvas, below, text, _NOTE_COLOUR, font, ())
    return canvas


def _colours(labels: Sequence[str]) -> dict[str, Colour]:
    """Return one colour for each distinct label, in the order of first appearance."""
    colours: dict[str, Colour] = {}
    for label in labels:
        hue = (len(colours) * _GOLDEN) % 1.0
        r, g, b = colorsys.hsv_to_rgb(hue, _SATURATION, _VALUE)
        colours.setdefault(label, (round(255 * r), round(255 * g), round(255 * b)))
    return colours


def _draw_outline(canvas: Image.Image, shape: Shape, colour: Colour, thickness: int) -> None:
    points = [(x, y) for x, y in shape.points]
    if shape.filled and len(points) > 2:
        mask = Image.new("L", canvas.size)
        ImageDraw.Draw(mask).polygon(points, fill=_FILL_ALPHA)
        canvas.paste(colour, (0, 0, *canvas.size), mask)
    ImageDraw.Draw(canvas).line([*points, points[0]], fill=colour, width=thickness, joint="curve")


@functools.lru_cache(maxsize=8)
def _fonts(size: int) -> tuple[Font, ...]:
    """Return the installed fonts, and Pillow's own last, which has only Latin letters without accents."""
    installed: list[Font] = []
    for name in _FONTS:
        with contextlib.suppress(OSError):
            installed.append(ImageFont.truetype(name, size))
    return (*installed, ImageFont.load_default(size))


def _choose_font(text: str, fonts: Sequence[Font]) -> tuple[str, Font]:
    """Return the first font that has all letters, or the last font and the text with its missing letters replaced."""
    for font in fonts:
        if all(_has(font, letter) for letter in set(text)):
            return text, font
    return "".join(_written(letter, fonts[-1]) for letter in text), fonts[-1]


def _written(letter: str, font: Font) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(c))
    return next((form for form in (letter, plain) if form and all(_has(font, c) for c in form)), "?")


@functools.lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    """Tell whether the font has the letter, by comparing it with the glyph for a missing one."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffe"))


def _draw_label(
    canvas: Image.Image,
    points: Points,
    text: str,
    colour: Colour,
    font: Font,
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Write `text` on a plate of the shape's colour; return the plate's rectangle."""
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(2, round((bottom - top) / 5))
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = min(point[0] for point in points)
    y = min(point[1] for point in points) - height
    x = max(0.0, min(x, canvas.width - width))
    y = max(0.0, min(y, canvas.height - height))
    while any(x < b[2] and b[0] < x + width and y < b[3] and b[1] < y + height for b in taken):
        if y + 2 * height > canvas.height:  # no room below: let it overlap rather than vanish
            break
        y += height
    plate = (x, y, x + width, y + height)
    draw.rectangle(plate, fill=colour)
    brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = (0, 0, 0) if brightness > _BRIGHT else (255, 255, 255)
    draw.text((x + pad - left, y + pad - top), text, fill=ink, font=font)
    return plate
