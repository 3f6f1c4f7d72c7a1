"""The images that a file of training data names: their paths, and their sizes when upright."""

from pathlib import Path

from florence2.errors import shown
from florence2.inputs.formats import open_lazily
from florence2.inputs.image import open_image
from florence2.train.entries import DataError

_EXIF_ORIENTATION = 0x0112


class ImageFolder:
    """Images named relative to `folder`. Each is searched for and measured once."""

    def __init__(self, folder: Path):
        """Raise DataError when `folder` is not a folder."""
        if not folder.is_dir():
            raise DataError(f"The image folder {folder} does not exist or is not a folder. Check the path.")
        self.folder = folder
        self._exists: dict[str, bool] = {}
        self._sizes: dict[Path, tuple[int, int]] = {}

    def find(self, name: str) -> Path:
        """Return the path of an image without opening it. Raise DataError when the file does not exist."""
        path = self.folder / name
        if name not in self._exists:
            self._exists[name] = bool(name) and _is_file(path)
        if not self._exists[name]:
            raise DataError(
                f"the image {shown(name)} is not in {self.folder}. Add it, or give the folder of the images."
            )
        return path

    def size(self, path: Path) -> tuple[int, int]:
        """Return (width, height) in pixels of the upright image. Raise ImageError when it cannot be read."""
        if path not in self._sizes:
            self._sizes[path] = upright_size(path)
        return self._sizes[path]


def upright_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of the image that `open_image` returns; read only the header where that suffices."""
    try:
        with open_lazily(path) as image:
            if image.getexif().get(_EXIF_ORIENTATION, 1) == 1:
                return image.size
    except Exception:  # noqa: BLE001  open_image explains or tolerates whatever is wrong
        pass
    return open_image(path).size


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long or contains a zero byte
        return False
