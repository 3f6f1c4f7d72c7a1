"""Images in Parquet tables, which become files: each table is read once, in its order, after all rows are known."""

import re
from collections.abc import Callable
from pathlib import Path

from florence2.dataset.files import Files
from florence2.errors import ImageError
from florence2.label.sources.tables import Columns, TableImage, read_table

_PLACE = re.compile(r"(.+\.parquet)::(\d+)", re.IGNORECASE | re.DOTALL)
_BEGINNINGS = {
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def split_row(place: str) -> tuple[str, int] | None:
    """Return the table and the row that a place names, or None for an image elsewhere."""
    match = _PLACE.fullmatch(place)
    return None if match is None else (match[1], int(match[2]))


class TableImages:
    """Images in tables that are to become files."""

    def __init__(self) -> None:
        self._wanted: dict[str, dict[int, list[tuple[str, Callable[[str], None]]]]] = {}

    def add(self, table: str, row: int, target: str, brought: Callable[[str], None]) -> None:
        """Want the image of a row at `target`; `brought` is called with the ending that its path gets."""
        self._wanted.setdefault(table, {}).setdefault(row, []).append((target, brought))

    def write(self, files: Files) -> int:
        """Write all; return how many could not be read.

        Raises OSError where a file cannot be written, and OptionError if pyarrow is not installed.
        """
        missing = 0
        for table, wanted in sorted(self._wanted.items()):
            for item in read_table(Path(table), Columns()) if Path(table).is_file() else ():
                image = item.source.data
                if not isinstance(image, TableImage) or image.row not in wanted:
                    continue
                try:
                    content = image.read()
                except ImageError:
                    continue
                ending = next((_BEGINNINGS[begin] for begin in _BEGINNINGS if content.startswith(begin)), ".image")
                for target, brought in wanted.pop(image.row):
                    files.make(f"{target}{ending}", content)
                    brought(ending)
            missing += sum(map(len, wanted.values()))
        self._wanted.clear()
        return missing
