"""Images in a dataset: links to, or copies of, the files that were labelled."""

import os
import shutil
from pathlib import Path

from florence2.dataset.names import split_suffix
from florence2.errors import OptionError

LINKS = ("symlink", "hard", "copy")
MISSING = "missing_images"


class ImageFiles:
    """Brings images into a folder by one of `LINKS`."""

    def __init__(self, link: str):
        self.link = link
        self._made: set[str] = set()

    def put(self, place: str, id_: str, target: Path) -> str:
        """Bring the image at a place to `target`, whose ending is still to come; return the ending.

        Raises:
            FileNotFoundError: No regular file is at the place.
            OptionError: A hard link cannot be made, because the folders are on different disks.
        """
        if not os.path.isabs(place) or "\0" in place or not os.path.isfile(place):  # noqa: PTH113, PTH117  for a million
            raise FileNotFoundError(place)
        ending = split_suffix(place)[1] or split_suffix(id_)[1]
        path = f"{target}{ending}"
        self._make_folder(target.parent)
        if self.link == "symlink":
            os.symlink(place, path)  # noqa: PTH211
        elif self.link == "copy":
            shutil.copyfile(place, path)
        else:
            self._hard_link(place, path)
        return ending

    def _hard_link(self, place: str, path: str) -> None:
        try:
            os.link(place, path)
        except OSError as error:
            raise OptionError(
                f"A hard link to {place} cannot be made: {error.strerror}. Give --link symlink or copy."
            ) from None

    def _make_folder(self, folder: Path) -> None:
        if (name := str(folder)) not in self._made:
            folder.mkdir(parents=True, exist_ok=True)
            self._made.add(name)
