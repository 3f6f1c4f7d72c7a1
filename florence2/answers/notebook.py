"""Show an answer to people: as text, or in a notebook as a drawing, or as HTML where there is no image to draw on."""

import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

MAX_SIDE = 1024  # pixels: a photo of 12 megapixels would add 20 MB of PNG to the notebook's file

Row = tuple[str, float | None, Sequence[float]]
"""A label, a confidence or score, and coordinates in pixels."""
_COORDINATES = {4: "x1 y1 x2 y2", 8: "x1 y1 ... x4 y4"}


def to_png(drawing: Image.Image) -> bytes:
    """Return a drawing as a PNG file, made smaller where a side is longer than `MAX_SIDE`."""
    drawing.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    drawing.save(buffer, "PNG")
    return buffer.getvalue()


def text_to_html(text: str) -> str:
    """Return escaped text that keeps its line breaks and wraps long lines."""
    return f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'


def rows_to_lines(rows: Sequence[Row], number: str) -> list[str]:
    """Return a line for each row, in columns; where they have numbers, after a line that names the columns."""
    if all(value is None for _, value, _ in rows):
        return ["  ".join(part for part in (label, _numbers(row)) if part) for label, _, row in rows]
    lengths = {len(row) for _, _, row in rows}
    names = _COORDINATES.get(min(lengths), "") if len(lengths) == 1 else ""
    cells = [("label", number, f"{names or 'x1 y1 x2 y2 ...'} in pixels")]
    cells += [(label, "" if value is None else f"{value:.2f}", _numbers(row)) for label, value, row in rows]
    if not any(label for label, _, _ in rows):
        cells = [("", *rest) for _, *rest in cells]  # type: ignore[misc]
    wide, narrow = (max(len(cell[column]) for cell in cells) for column in (0, 1))
    return [f"{label:<{wide}}  {value:>{narrow}}  {row}".strip() for label, value, row in cells]


def _numbers(row: Sequence[float]) -> str:
    return " ".join(f"{value:.1f}" for value in row)


def rows_to_html(rows: Iterable[Row], note: str | None = None, number: str = "score") -> str:
    """Return a table of labels, numbers of that name, and coordinates, with the note as its caption."""
    caption = "" if note is None else f"<caption>{html.escape(note)}</caption>"
    head = f"<tr><th>label</th><th>{number}</th><th>coordinates in pixels</th></tr>"
    return f"<table>{caption}{head}{''.join(_row_to_html(*row) for row in rows)}</table>"


def _row_to_html(label: str, score: float | None, coordinates: Sequence[float]) -> str:
    cells = (html.escape(label), "" if score is None else f"{score:.2f}", _numbers(coordinates))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
