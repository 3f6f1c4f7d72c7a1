"""Show an answer to people: as text, or in a notebook as a drawing, or as HTML where there is no image to draw on."""

import contextlib
import html
import io
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from florence2.inputs.files import is_url

MAX_SIDE = 1024  # pixels: a photo of 12 megapixels would add 20 MB of PNG to the notebook's file

Row = tuple[str, float | None, Sequence[float]]
"""A label, a confidence or score, and coordinates in pixels."""
ImageReference: TypeAlias = "Path | weakref.ref[Any] | None"
"""Where an answer finds its image again, without keeping it alive."""
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
    wide, narrow = (max(len(cell[column]) for cell in cells) for column in (0, 1))
    start = f"{{0:<{wide}}}  " if any(label for label, _, _ in rows) else ""  # proposals have no labels
    return [start.format(label) + f"{value:>{narrow}}  {row}" for label, value, row in cells]


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


def image_reference(source: Any) -> ImageReference:
    """Return what `Answer.image` needs to find an image again without keeping it alive.

    Args:
        source: What the user gave as the image, in any form that `open_image` reads.

    Returns:
        A path for a path; a weak reference to a Pillow image, array or tensor; None for everything else, such as
        bytes, file objects and data URLs.
    """
    if isinstance(source, str | os.PathLike):
        return None if is_url(os.fspath(source)) else Path(source)
    if isinstance(source, Image.Image) or hasattr(source, "__array__"):
        with contextlib.suppress(TypeError):  # a class with slots may not support weak references
            return weakref.ref(source)
    return None
