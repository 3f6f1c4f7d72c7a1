"""The pictures that a file of training data names: where they are, and how large upright."""

from pathlib import Path

from PIL import Image

from florence2.errors import shown
from florence2.inputs.image import open_image
from florence2.train.entries import DataError

_EXIF_ORIENTATION = 0x0112


class Pictures:
    """Pictures named relative to `folder`. Each is looked for, and measured, once."""

    def __init__(self, folder: Path):
        """Raises DataError when `folder` is none."""
        if not folder.is_dir():
            raise DataError(f"{folder}, where the pictures should be, is no folder; check the path.")
        self.folder = folder
        self._found: dict[str, bool] = {}
        self._sizes: dict[Path, tuple[int, int]] = {}

    def find(self, name: str) -> Path:
        """The path of a picture. Raises DataError when there is no such file; it is not opened."""
        path = self.folder / name
        if name not in self._found:
            self._found[name] = bool(name) and _is_file(path)
        if not self._found[name]:
            raise DataError(f"the picture {shown(name)} is not in {self.folder}; add it, or say where pictures are.")
        return path

    def size(self, path: Path) -> tuple[int, int]:
        """(width, height) in pixels of the upright picture. Raises ImageError when it cannot be read."""
        if path not in self._sizes:
            self._sizes[path] = upright_size(path)
        return self._sizes[path]


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of what `open_image` makes of a file, from its header where that is enough."""
    try:
        with Image.open(path) as image:
            if image.getexif().get(_EXIF_ORIENTATION, 1) == 1:
                return image.size
    except Exception:  # noqa: BLE001  whatever it is, open_image knows how to say or to forgive it
        pass
    return open_image(path).size


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero in it
        return False
