"""An output folder that appears with all of its files, or not at all."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from florence2.checkpoints.files import cannot_write, clip_name
from florence2.errors import OutputError


def refuse_full(folder: Path) -> None:
    """Raise OutputError unless `folder` is missing or an empty folder."""
    try:
        if folder.is_dir() and not any(folder.iterdir()):
            return
        if not folder.exists() and not folder.is_symlink():
            return
    except OSError as error:
        raise cannot_write(folder, error.strerror or str(error)) from None
    problem = "is not empty" if folder.is_dir() else "is not a folder"
    raise OutputError(f"{folder} {problem}; choose a new folder for the export.", problem)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder next to `folder`; rename it to that when the block succeeds, remove it otherwise.

    Raises OutputError where `folder` holds anything, or cannot be written.
    """
    refuse_full(folder)
    missing = [parent for parent in folder.parents if not parent.exists()]
    draft = folder.parent / f".{clip_name(folder.name, 100)}.{secrets.token_hex(6)}"
    done = False
    try:
        draft.mkdir(parents=True)
        yield draft
        if folder.is_dir():
            folder.rmdir()  # empty, or this fails; not every system renames over a folder
        draft.rename(folder)
        done = True
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(folder, error.strerror or str(error)) from None
    finally:
        if not done:
            shutil.rmtree(draft, ignore_errors=True)
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()
