"""The file that `--out` names: checked before the slow part begins, then written completely or not at all."""

from pathlib import Path

from florence2.checkpoints.files import written_whole
from florence2.errors import OptionError


def check_out(path: Path, overwrite: bool) -> None:
    """Raise OptionError for a path that cannot be written and, without `overwrite`, for a file that exists."""
    try:
        if not path.absolute().parent.is_dir():
            raise OptionError(f"The folder {path.parent} for {path.name} does not exist; create it first.")
        if path.is_dir():
            raise OptionError(f"{path} is a folder; --out needs a file, such as {path}/report.html.")
        exists, regular = path.exists(), path.is_file()
    except OSError as error:  # such as a name that is too long, or a folder without permission to read it
        raise _unwritable(path, error) from None
    if exists and not regular:
        raise OptionError(f"{path} is a device or a pipe, which would be replaced; --out needs the name of a file.")
    if exists and not overwrite:
        raise OptionError(f"{path} exists; choose another name, or add --overwrite.")


def write_out(path: Path, text: str) -> None:
    """Write `text` as UTF-8, with its line ends unchanged. Raises OptionError when it cannot be written."""
    try:
        with written_whole(path) as draft:
            draft.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> OptionError:
    return OptionError(f"{path} cannot be written: {error.strerror}. Choose another name or folder.")
