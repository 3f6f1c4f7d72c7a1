"""Images in a dataset: links to, or copies of, the files that were labelled; those in tars are unpacked."""

import os
import re
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from florence2.dataset.files import Files
from florence2.dataset.names import split_suffix
from florence2.dataset.table_images import TableImages, split_row
from florence2.errors import ImageError, OptionError
from florence2.label.sources.tars import TarImage, read_tar

LINKS = ("symlink", "hard", "copy")
MISSING = "missing_images"
_TAR_MARK = re.compile(r"(?<=\.tar)::", re.IGNORECASE)
_REPEATED = re.compile(r"-\d+$")  # the number of a name that stands in a tar before


def find_image(place: str) -> str | TarImage | None:
    """Return the file or the member of a tar that a row names as the place of its image; None if it is not there."""
    tar, _ = split_place(place)
    if tar:
        return _images_of_tar(tar).get(place) if _is_file(tar) else None
    return place if _is_file(place) else None


def place_below(folder: Path, place: str, id: str) -> str:
    """Return the place of an image: another one, below a folder, for a file that is not where it was."""
    moved = not split_place(place)[0] and split_row(place) is None and not _is_file(place)
    return os.path.abspath(os.path.join(folder, id)) if moved else place  # noqa: PTH100, PTH118


def split_place(place: str) -> tuple[str, str]:
    """Return the path of the tar that holds an image, and its name there; two empty texts for other images."""
    if "::" not in place:
        return "", ""
    path, *name = _TAR_MARK.split(place, maxsplit=1)
    return (path, _REPEATED.sub("", name[0])) if name else ("", "")


def _is_file(path: str) -> bool:
    """Return whether an absolute path is that of a regular file: a FIFO would never end."""
    return os.path.isabs(path) and "\0" not in path and os.path.isfile(path)  # noqa: PTH113, PTH117  for a million


@lru_cache(maxsize=4)
def _images_of_tar(path: str) -> dict[str, TarImage]:
    """Return where the images of a tar are, by their places."""
    items = read_tar(Path(path))
    return {item.source.place: item.source.data for item in items if isinstance(item.source.data, TarImage)}


class ImageFiles:
    """Brings images into a folder by one of `LINKS`."""

    def __init__(self, link: str):
        self.link = link
        self._files, self._tables = Files(), TableImages()

    def put(self, place: str, target: str, brought: Callable[[str], None] = lambda _: None) -> None:
        """Bring the image at a place to `target`, whose ending is still to come; images in tables wait for `finish`.

        Args:
            place: Where the image is.
            target: The path of the file, without its ending.
            brought: Called with the ending, once the image is there.

        Raises:
            FileNotFoundError: No image is at the place.
            OptionError: A hard link cannot be made, because the folders are on different disks.
        """
        if (row := split_row(place)) is not None:
            self._tables.add(*row, target, brought)
            return
        image = find_image(place)
        if image is None:
            raise FileNotFoundError(place)
        name = place if isinstance(image, str) else split_place(place)[1]
        ending = split_suffix(name)[1] or ".image"
        path = f"{target}{ending}"
        if self.link == "symlink" and isinstance(image, str):
            self._files.make(path, place)
        else:
            self._files.make_folder_of(path)
            self._copy(image, path)
        brought(ending)

    def _copy(self, image: str | TarImage, path: str) -> None:
        if not isinstance(image, str):
            _unpack(image, path)
        elif self.link == "copy":
            shutil.copyfile(image, path)
        else:
            _link_hard(image, path)

    def finish(self) -> int:
        """Bring the images of tables; return how many of them cannot be read. Raises OSError."""
        return self._tables.write(self._files)


def _unpack(image: TarImage, path: str) -> None:
    try:
        content = image.read()
    except ImageError:
        raise FileNotFoundError(path) from None
    Path(path).write_bytes(content)


def _link_hard(place: str, path: str) -> None:
    try:
        os.link(os.path.realpath(place), path)  # that of a symbolic link would lead nowhere from another folder
    except OSError as error:
        raise OptionError(
            f"A hard link to {place} cannot be made: {error.strerror}. Give --link symlink or copy."
        ) from None
