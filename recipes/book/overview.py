"""The diagram of the whole model, as an SVG that follows the reader's light or dark colours."""

from html import escape

from florence2.checkpoints.presets import preset
from florence2.inputs.tokenizer import FlorenceTokenizer
from recipes.book.values import PUBLISHED_TOKENIZER

_WIDTH, _HEIGHT, _BOX, _ROW = 720, 318, (150, 62), 104
_STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #22262b; text-anchor: middle }
    .small { font-size: 11.5px; fill: #5a6068 }
    .data { fill: #ffffff; stroke: #b9bec6 } .part { fill: #dbe7f5; stroke: #2f6db5 }
    path { stroke: #5a6068; stroke-width: 1.6; fill: none; marker-end: url(#tip) }
    #tip path { fill: #5a6068; stroke: none }
    @media (prefers-color-scheme: dark) {
      text { fill: #e8eaed } .small { fill: #a9b0b8 }
      .data { fill: #22262b; stroke: #5a6068 } .part { fill: #1d3350; stroke: #5b93d6 }
      path { stroke: #a9b0b8 } #tip path { fill: #a9b0b8 }
    }
"""


def draw_overview() -> str:
    """Return the SVG, with the sizes of base."""
    config = preset("base")
    vision, text = config.vision, config.text
    h, w = vision.grid_size(768, 768)
    tokens = vision.image_tokens(768, 768)
    prompt = len(FlorenceTokenizer(PUBLISHED_TOKENIZER).encode("Locate the objects with category name in the image."))
    rows = [
        [
            ("data", "image", "768 x 768 x 3"),
            ("part", "DaViT", f"{len(vision.depths)} stages, {sum(vision.depths)} pairs"),
            ("data", "grid", f"{h} x {w} x {vision.dim_embed[-1]:,}"),
            ("part", "projection", f"{tokens} image tokens"),
        ],
        [
            ("data", "prompt", "“Locate the objects ...”"),
            ("part", "tokenizer", f"{prompt} prompt tokens"),
            ("data", "one sequence", f"{tokens + prompt} x {text.d_model}"),
            ("part", "encoder", f"{text.encoder_layers} layers"),
        ],
        [
            ("data", "boxes", "in pixels"),
            ("data", "text", "car<loc_52>..."),
            ("part", "beam search", f"{config.generation['num_beams']} beams"),
            ("part", "decoder", f"{text.decoder_layers} layers"),
        ],
    ]
    boxes = [_box(column, row, *part) for row, parts in enumerate(rows) for column, part in enumerate(parts)]
    flow = [(0, 0, 1, 0), (1, 0, 2, 0), (2, 0, 3, 0), (0, 1, 1, 1), (1, 1, 2, 1), (2, 1, 3, 1), (3, 1, 3, 2)]
    flow += [(3, 2, 2, 2), (2, 2, 1, 2), (1, 2, 0, 2)]
    arrows = [_arrow(*ends) for ends in flow] + [
        f'<path d="M {_middle(3)} {_bottom(0)} C {_middle(3)} {_top(1) - 8}, '
        f'{_middle(2)} {_bottom(0) + 10}, {_middle(2)} {_top(1) - 4}"/>'
    ]  # image tokens join the sequence
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    tip += '<path d="M 0 0 L 8 4 L 0 8 z"/></marker>'
    title = "<title>Image and prompt become one sequence, the decoder writes a text, the text holds boxes</title>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
    return "\n".join([head, title, f"<style>{_STYLE}</style>", f"<defs>{tip}</defs>", *arrows, *boxes, "</svg>", ""])


def _left(column: int) -> int:
    return 12 + column * 182


def _middle(column: int) -> int:
    return _left(column) + _BOX[0] // 2


def _top(row: int) -> int:
    return 24 + row * _ROW


def _bottom(row: int) -> int:
    return _top(row) + _BOX[1]


def _box(column: int, row: int, kind: str, name: str, size: str) -> str:
    x, y = _left(column), _top(row)
    shape = f'<rect class="{kind}" x="{x}" y="{y}" width="{_BOX[0]}" height="{_BOX[1]}" rx="8"/>'
    name = f'<text x="{_middle(column)}" y="{y + 26}">{escape(name)}</text>'
    return shape + name + f'<text class="small" x="{_middle(column)}" y="{y + 46}">{escape(size)}</text>'


def _arrow(column: int, row: int, to_column: int, to_row: int) -> str:
    if row != to_row:
        return f'<path d="M {_middle(column)} {_bottom(row)} V {_top(to_row) - 4}"/>'
    y = _top(row) + _BOX[1] // 2
    start, end = (
        (_left(column) + _BOX[0], _left(to_column) - 4)
        if column < to_column
        else (_left(column), _left(to_column) + _BOX[0] + 4)
    )
    return f'<path d="M {start} {y} H {end}"/>'
