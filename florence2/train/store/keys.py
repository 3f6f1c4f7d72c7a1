"""Name images by their content, so that whatever was computed from one is found again under any file name."""

import hashlib
import os
from pathlib import Path

from florence2.bulk.sources import FileVersion, Source
from florence2.errors import ImageError
from florence2.inputs.files import is_url
from florence2.inputs.image import ImageInput
from florence2.processor import Processor

_DIGITS = 32
_BLOCK_BYTES = 1 << 20


class ImageKeys:
    """The keys of images, equal for equal content. A file is read again only when its size or time has changed."""

    def __init__(self, processor: Processor):
        self._processor = processor
        self.known: dict[str, tuple[FileVersion, str]] = {}
        """The version and the key of each file that was read, by its path."""

    def __call__(self, image: ImageInput) -> str:
        """Return 32 hexadecimal digits: of a file's bytes, or of the pixels of anything else.

        Raises ImageError for an image that cannot be read.
        """
        if isinstance(image, str | os.PathLike) and not is_url(os.fsdecode(image)):
            return self._of_file(Path(os.fsdecode(image)))
        return self._of_pixels(image)

    def _of_file(self, path: Path) -> str:
        version = Source(str(path), path, path.stem).version()  # before the file is read, so that no change goes unseen
        if version is None or not path.is_file():
            return self._of_pixels(path)  # which says what is wrong
        known = self.known.get(str(path))
        if known is None or known[0] != version:
            known = self.known[str(path)] = version, _hash_file(path)
        return known[1]

    def _of_pixels(self, image: ImageInput) -> str:
        opened = self._processor.open_image(image)
        hashed = hashlib.sha256(f"{opened.mode} {opened.size} ".encode())
        hashed.update(opened.tobytes())
        return hashed.hexdigest()[:_DIGITS]


def _hash_file(path: Path) -> str:
    hashed = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                hashed.update(block)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}.") from None
    return hashed.hexdigest()[:_DIGITS]
