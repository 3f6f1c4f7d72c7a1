"""The drawing of the whole model, for light and dark pages, with the sizes of base from its preset."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from florence2.checkpoints.presets import preset

SIDE = 768  # pixels of the published preprocessor
WIDTH, HEIGHT = 1010, 230
_FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


@dataclass(frozen=True)
class Theme:
    """Colours of one drawing."""

    ink: str
    quiet: str
    data: str
    part: str
    edge: str


THEMES = {
    "model.svg": Theme("#1f2328", "#59636e", "#eef1f4", "#dbeafe", "#3b82c4"),
    "model-dark.svg": Theme("#e6edf3", "#9aa5b1", "#21262d", "#173a5e", "#58a6ff"),
}


@dataclass(frozen=True)
class Box:
    """A part of the model, or (`is_part` False) what passes between parts: its place, name and sizes."""

    x: int
    y: int
    width: int
    lines: Sequence[str]
    is_part: bool = False
    height: int = 62

    @property
    def left(self) -> tuple[int, int]:
        return self.x, self.y + self.height // 2

    @property
    def right(self) -> tuple[int, int]:
        return self.x + self.width, self.y + self.height // 2

    def draw(self, theme: Theme) -> str:
        """Return the box with its name in bold and the other lines below it."""
        fill, edge = (theme.part, theme.edge) if self.is_part else (theme.data, theme.quiet)
        middle, top = self.x + self.width / 2, self.y + self.height / 2 - 8 * (len(self.lines) - 1) + 4
        texts = [
            f"<text x='{middle:g}' y='{top + 16 * row:g}' text-anchor='middle' "
            + (f"font-weight='600' fill='{theme.ink}'" if row == 0 else f"fill='{theme.quiet}'")
            + f">{escape(line)}</text>"
            for row, line in enumerate(self.lines)
        ]
        return (
            f"<rect x='{self.x}' y='{self.y}' width='{self.width}' height='{self.height}' rx='8' fill='{fill}' "
            f"stroke='{edge}'/>" + "".join(texts)
        )


def draw_overview(theme: Theme) -> str:
    """Return the drawing as SVG."""
    config = preset("base")
    text, vision = config.text, config.vision
    tokens, width = vision.image_tokens(SIDE, SIDE), text.d_model
    image = Box(10, 20, 100, ("image", f"{SIDE} x {SIDE} x 3"))
    tower = Box(
        136,
        20,
        184,
        ("DaViT", f"{len(vision.depths)} stages: windows, channels", " → ".join(map(str, vision.dim_embed))),
        True,
    )
    projection = Box(346, 20, 110, ("projection", f"{tokens} x {width}"), True)
    task = Box(10, 140, 100, ("task + text", '"<OD>"'))
    tokenizer = Box(136, 140, 184, ("tokenizer", "task → sentence → ids"), True)
    prompt = Box(346, 140, 110, ("embedding", f"T x {width}"), True)
    encoder = Box(496, 80, 130, ("encoder", f"{text.encoder_layers} layers", f"({tokens} + T) x {width}"), True)
    decoder = Box(652, 80, 168, ("decoder", f"{text.decoder_layers} layers, beam search", _ids(text.vocab_size)), True)
    answer = Box(850, 20, 150, ("text", "cup<loc_285>…"))
    regions = Box(850, 140, 150, ("answer", "boxes, outlines, words"))
    boxes = (image, tower, projection, task, tokenizer, prompt, encoder, decoder, answer, regions)
    rows = ((image, tower, projection, encoder, decoder, answer), (task, tokenizer, prompt, encoder))
    lines = [_arrow(a.right, b.left, theme) for row in rows for a, b in pairwise(row)]
    down = ((answer.x + answer.width // 2, answer.y + answer.height), (regions.x + regions.width // 2, regions.y))
    parts = [*lines, _arrow(*down, theme), *(box.draw(theme) for box in boxes)]
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' {_FONT} font-size='12' role='img' "
        "aria-label='From an image and a task to an answer'>"
        f"<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0 0 L8 4 L0 8 z' fill='{theme.quiet}'/></marker></defs>" + "\n".join(parts) + "</svg>\n"
    )


def _ids(vocabulary: int) -> str:
    return f"{vocabulary:,} ids"


def _arrow(start: tuple[int, int], end: tuple[int, int], theme: Theme) -> str:
    """Return a line from one box to another, straight or with one bend in the middle."""
    (x1, y1), (x2, y2) = start, end
    middle = (x1 + x2) // 2
    path = f"M{x1} {y1} H{middle} V{y2} H{x2 - 2}" if x1 != x2 else f"M{x1} {y1} V{y2 - 2}"
    return f"<path d='{path}' fill='none' stroke='{theme.quiet}' stroke-width='1.5' marker-end='url(#tip)'/>"
