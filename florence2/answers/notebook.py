"""Show an answer in a notebook: as a drawing, or as HTML where its image cannot be drawn on."""

import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

MAX_SIDE = 1024  # pixels: a photo of 12 megapixels would add 20 MB of PNG to the notebook's file

Row = tuple[str, float | None, Sequence[float]]
"""A label, a score, and coordinates in pixels."""


def to_png(drawing: Image.Image) -> bytes:
    """Return a drawing as a PNG file, made smaller where a side is longer than `MAX_SIDE`."""
    drawing.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    drawing.save(buffer, "PNG")
    return buffer.getvalue()


def text_to_html(text: str) -> str:
    """Return escaped text that keeps its line breaks and wraps long lines."""
    return f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'


def rows_to_html(rows: Iterable[Row], note: str | None = None) -> str:
    """Return a table of labels, scores and coordinates, with the note as its caption."""
    caption = "" if note is None else f"<caption>{html.escape(note)}</caption>"
    head = "<tr><th>label</th><th>score</th><th>coordinates in pixels</th></tr>"
    return f"<table>{caption}{head}{''.join(_row_to_html(*row) for row in rows)}</table>"


def _row_to_html(label: str, score: float | None, coordinates: Sequence[float]) -> str:
    cells = (html.escape(label), "" if score is None else f"{score:.2f}", " ".join(f"{x:.1f}" for x in coordinates))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
