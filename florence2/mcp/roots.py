"""The folders below which images may be read."""

import os
from collections.abc import Sequence
from pathlib import Path

from florence2.errors import ImageError, OptionError, clip, shown
from florence2.inputs.files import check_regular


def check_roots(folders: Sequence[Path]) -> tuple[Path, ...]:
    """Return the folders with links resolved. Raises OptionError for one that is missing or not a folder."""
    for folder in folders:
        if not folder.is_dir():
            raise OptionError(f"--root {shown(os.fspath(folder))} is not a folder; name an existing one.")
    return tuple(folder.resolve() for folder in folders)


def find_image(path: str, roots: Sequence[Path]) -> Path:
    """Return the file that `path` means: below a root, after all links are followed.

    A relative path is looked for in the roots in their order. Raises ImageError where no such file is below a root;
    the message is the same whether or not the file exists elsewhere.
    """
    for root in roots:
        try:
            file = (root / path).resolve(strict=True)  # of an absolute path, the path itself
        except (OSError, ValueError, RuntimeError):
            continue
        if any(file.is_relative_to(each) for each in roots):
            return check_regular(os.fspath(file))
    raise ImageError(
        f"{clip(shown(path))} is not a file below the folders that this server may read: {', '.join(map(str, roots))}."
    )
