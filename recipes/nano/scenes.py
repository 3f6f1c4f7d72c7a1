"""Synthetic scenes of shapes, letters, digits and words, drawn from a seed, with everything on them known.

`make_scene(seed, index)` gives the same image on every machine with the same Pillow. The checkpoint `weights/nano` is
trained and measured on these scenes, and tutorials use them as data.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (246, 136, 20),
    "yellow": (248, 220, 40),
    "green": (36, 150, 62),
    "cyan": (50, 200, 214),
    "blue": (34, 70, 206),
    "purple": (126, 44, 166),
    "pink": (246, 128, 184),
    "brown": (122, 74, 36),
    "black": (20, 20, 22),
    "white": (250, 250, 250),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "light gray": (208, 208, 208),
    "dark gray": (92, 94, 98),
    "beige": (226, 212, 182),
    "light blue": (186, 208, 230),
    "light green": (190, 222, 190),
    "dark blue": (34, 42, 80),
    "dark green": (28, 66, 48),
}
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
WORDS: tuple[str, ...] = tuple(
    """
    ACE AIR ANT APE ARM ART BAG BAR BAT BED BEE BIG BIN BOX BOY BUS CAB CAN CAP CAR CAT COW CUP DAY DOG DOOR EAR EGG
    EYE FAN FAR FISH FIVE FLY FOG FOX FUN GAS GOLD GOOD HAM HAT HEN HOME HOT HUT ICE INK JAM JAR JET JOB KEY KING KITE
    LAMP LEG LID LION LIP LOG LOVE MAP MILK MOON MUD NET NEW NINE NUT OAK OIL ONE OPEN OWL PAN PARK PEN PIG PIN POT
    RAIN RAT RED ROAD ROOM SALE SEA SHOP SIX SKY STOP SUN TAXI TEA TEN TIE TOP TOY TREE TWO VAN WAX WEB WEST WIN WOLF
    YES ZERO ZIP ZOO
    """.split()
)


@dataclass(frozen=True)
class Thing:
    """One drawn object. Coordinates are pixels of the image.

    `category` is "circle", "letter A", "digit 7" or "word". `text` is the printed text, empty for a shape. `outline` is
    its mask as a polygon, clockwise from the top; for printed text, the quad from its top left.
    """

    color: str
    category: str
    size: str
    texture: str
    outline: tuple[Point, ...]
    text: str = ""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Return left, top, right, bottom."""
        xs, ys = zip(*self.outline, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def phrase(self) -> str:
        """Return its colour and category, unique in the scene: "red circle"."""
        return f"{self.color} {self.category}"

    @property
    def noun(self) -> str:
        """Return its category, and for a word its letters: "word STOP"."""
        return f"word {self.text}" if self.category == "word" else self.category


@dataclass(frozen=True)
class Scene:
    """An image and the things on it, ordered by their left edge."""

    image: Image.Image
    background: str
    things: tuple[Thing, ...]


def make_scene(seed: int, index: int, most_things: int = 5) -> Scene:
    """Draw scene `index` of the endless series `seed`: RGB, sides of 200 to 320 pixels, 1 to `most_things` things."""
    rng = random.Random(f"{seed}/{index}/{most_things}")
    width, height = rng.randint(200, 320), rng.randint(200, 320)
    background = rng.choice(list(BACKGROUNDS))
    canvas = _draw_background(rng, background, (width, height))
    things: list[Thing] = []
    for _ in range(rng.randint(1, most_things)):
        thing = _place(rng, canvas, background, things)
        if thing is not None:
            things.append(thing)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    return Scene(image, background, tuple(sorted(things, key=lambda thing: thing.box)))


# ---- what may be drawn --------------------------------------------------------------------------------------------


def _turn(corners: int, start: float = -90.0, radius: Callable[[int], float] = lambda _: 1.0) -> list[Point]:
    angles = [math.radians(start + 360 * k / corners) for k in range(corners)]
    return [(radius(k) * math.cos(angle), radius(k) * math.sin(angle)) for k, angle in enumerate(angles)]


SHAPES: dict[str, list[Point]] = {
    "circle": _turn(12),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "star": _turn(10, radius=lambda k: 1.0 if k % 2 == 0 else 0.42),
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "cross": [
        *((-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33)),
        *((0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)),
    ],
    "heart": [
        *((0, -0.5), (0.3, -0.85), (0.65, -0.9), (0.95, -0.6), (0.95, -0.15), (0.55, 0.4)),
        *((0, 0.95), (-0.55, 0.4), (-0.95, -0.15), (-0.95, -0.6), (-0.65, -0.9), (-0.3, -0.85)),
    ],
    "arrow": [(-1, -0.3), (0.15, -0.3), (0.15, -0.8), (1, 0), (0.15, 0.8), (0.15, 0.3), (-1, 0.3)],
}
"""Outlines with coordinates from -1 to 1, y down. A circle is drawn round and outlined by twelve points."""


def _place(rng: random.Random, canvas: np.ndarray, background: str, others: Sequence[Thing]) -> Thing | None:
    """Draw one more thing where there is room; return None when 30 tries find none."""
    height, width = canvas.shape[:2]
    for _ in range(30):
        kind = rng.choices(("shape", "letter", "digit", "word"), weights=(50, 16, 12, 22))[0]
        color = rng.choice([name for name in COLORS if _contrast(COLORS[name], BACKGROUNDS[background]) > 120])
        size = rng.choice(("small", "large"))
        share = rng.uniform(0.19, 0.26) if size == "small" else rng.uniform(0.31, 0.44)
        angle = math.radians(rng.uniform(-8, 8))
        if kind == "shape":
            category, text = rng.choice(list(SHAPES)), ""
            mask, outline = _shape_mask(category, share * min(width, height), angle)
        else:
            text = _print(rng, kind)
            category = "word" if kind == "word" else f"{kind} {text}"
            points = share * min(width, height) * (0.68 if kind == "word" else 1.0)
            mask, outline = _text_mask(text, points, angle)
        if any(other.phrase == f"{color} {category}" for other in others):
            continue
        w, h = mask.shape[1], mask.shape[0]
        if w + 4 > width or h + 4 > height:
            continue
        left, top = rng.randint(2, width - w - 2), rng.randint(2, height - h - 2)
        texture = rng.choices(("plain", "striped", "dotted"), weights=(3, 1, 1))[0] if kind == "shape" else "plain"
        moved = tuple((x + left, y + top) for x, y in outline)
        thing = Thing(color, category, size, texture, moved, text)
        if all(_apart(thing.box, other.box) for other in others):
            region = canvas[top : top + h, left : left + w]
            region += mask[..., None] * (_paint(rng, color, texture, (w, h)) - region)
            return thing
    return None


def _print(rng: random.Random, kind: str) -> str:
    if kind == "word":
        return rng.choice(WORDS) if rng.random() < 0.8 else "".join(rng.choices(DIGITS, k=rng.randint(2, 3)))
    return rng.choice(LETTERS if kind == "letter" else DIGITS)


def _apart(a: Sequence[float], b: Sequence[float], gap: float = 4.0) -> bool:
    return a[2] + gap < b[0] or b[2] + gap < a[0] or a[3] + gap < b[1] or b[3] + gap < a[1]


def _contrast(a: Sequence[int], b: Sequence[int]) -> float:
    return math.dist(a, b)


# ---- drawing: masks at three times the size, reduced --------------------------------------------------------------

_FINE = 3


def _shape_mask(category: str, side: float, angle: float) -> tuple[np.ndarray, list[Point]]:
    """Return the coverage 0..1 (h, w) of a shape `side` pixels wide, and its outline in pixels of the mask."""
    round_one = category == "circle"
    points = [_rotate(point, 0.0 if round_one else angle) for point in SHAPES[category]]
    half_w, half_h = (1.0 if round_one else max(abs(point[axis]) for point in points) for axis in (0, 1))
    w, h = math.ceil(side * half_w) + 1, math.ceil(side * half_h) + 1
    outline = [(x * side / 2 + w / 2, y * side / 2 + h / 2) for x, y in points]
    fine = Image.new("L", (w * _FINE, h * _FINE))
    draw = ImageDraw.Draw(fine)
    if round_one:
        low, high = ((w - side) / 2, (h - side) / 2), ((w + side) / 2, (h + side) / 2)
        draw.ellipse([value * _FINE for value in (*low, *high)], fill=255)
    else:
        draw.polygon([(x * _FINE, y * _FINE) for x, y in outline], fill=255)
    return _coverage(fine, (w, h)), outline


def _text_mask(text: str, points: float, angle: float) -> tuple[np.ndarray, list[Point]]:
    """Return the coverage 0..1 (h, w) of printed text, and its quad, clockwise from the top left of the letters."""
    font = ImageFont.load_default(points * _FINE)
    stroke = round(points * _FINE / 36)  # a little bolder than the font
    _, _, right, bottom = font.getbbox(text, stroke_width=stroke)
    flat = Image.new("L", (math.ceil(right) + 2 * stroke + 2, math.ceil(bottom) + 2 * stroke + 2))
    ImageDraw.Draw(flat).text((stroke, stroke), text, font=font, fill=255, stroke_width=stroke)
    flat = flat.crop(flat.getbbox())  # the ink, without the space that the font leaves around it
    w, h = flat.size
    corners = [_rotate(corner, angle) for corner in ((0, 0), (w, 0), (w, h), (0, h))]
    dx, dy = min(x for x, _ in corners), min(y for _, y in corners)
    full_w, full_h = max(x for x, _ in corners) - dx, max(y for _, y in corners) - dy
    out_w, out_h = math.ceil(full_w / _FINE) + 1, math.ceil(full_h / _FINE) + 1
    # output pixel -> input pixel, the inverse of rotating by `angle` and shifting by (-dx, -dy)
    c, s = math.cos(angle), math.sin(angle)
    inverse = (c, s, c * dx + s * dy, -s, c, -s * dx + c * dy)
    fine = flat.transform((out_w * _FINE, out_h * _FINE), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    return _coverage(fine, (out_w, out_h)), [((x - dx) / _FINE, (y - dy) / _FINE) for x, y in corners]


def _rotate(point: Point, angle: float) -> Point:
    x, y = point
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def _coverage(fine: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(fine.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255


def _paint(rng: random.Random, color: str, texture: str, size: tuple[int, int]) -> np.ndarray:
    """Return a varied shade of the colour for every pixel, (h, w, 3) float32, with a pattern in a second tone."""
    w, h = size
    base = np.array([c + rng.uniform(-10, 10) for c in COLORS[color]], dtype=np.float32)
    paint = np.broadcast_to(base, (h, w, 3)).copy()
    if texture == "plain":
        return paint
    tone = base + (70 if base.mean() < 110 else -60)
    y, x = np.mgrid[0:h, 0:w]
    period = rng.uniform(8, 12)
    if texture == "striped":
        direction = rng.uniform(0, math.pi)
        pattern = np.sin((x * math.cos(direction) + y * math.sin(direction)) * 2 * math.pi / period) > 0.3
    else:
        pattern = (np.sin(x * 2 * math.pi / period) + np.sin(y * 2 * math.pi / period)) > 1.1
    paint[pattern] = tone
    return paint


def _draw_background(rng: random.Random, name: str, size: tuple[int, int]) -> np.ndarray:
    """Draw a plain, shaded, ruled or grainy background, (height, width, 3) float32."""
    w, h = size
    base = np.array([c + rng.uniform(-8, 8) for c in BACKGROUNDS[name]], dtype=np.float32)
    canvas = np.broadcast_to(base, (h, w, 3)).copy()
    kind = rng.choice(("plain", "shaded", "ruled", "grainy"))
    if kind == "shaded":
        slope = np.linspace(-18, 18, h, dtype=np.float32)[:, None] * rng.choice((-1, 1))
        canvas += slope[..., None]
    elif kind == "ruled":
        step = rng.randint(10, 24)
        canvas[::step] -= 14
        canvas[:, ::step] -= 14
    elif kind == "grainy":
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 9, (h, w, 1))
        canvas += noise.astype(np.float32)
    return canvas
