"""Where the bytes of an image come from: a path, a file object, a data URL. Other URLs are not fetched."""

import base64
import binascii
import io
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from florence2.errors import ImageError

if TYPE_CHECKING:
    from florence2.inputs.image import BinaryReader

MAX_STREAM_BYTES = 256 << 20
LFS_POINTER = b"version https://git-lfs"
"""The first bytes of the text that a clone without Git LFS has in the place of a large file."""
_CHUNK_BYTES = 1 << 20
_MAX_NAME = 300  # characters of a path or an URL in a message
_URL = re.compile(r"([a-z][a-z0-9+.-]*):/+", re.IGNORECASE)  # a Path has lost one of its two slashes


def is_url(text: str) -> bool:
    """Return whether a text is a URL and not a path: "https://...", "data:..."."""
    return text[:5].lower() == "data:" or (_URL.match(text) is not None and text[1:2] != ":")


def short_name(text: str, longest: int = _MAX_NAME) -> str:
    """Return a path for a message, in full unless it is very long."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def url_problem(path: str) -> str | None:
    """Return the sentence about a name that is empty or a URL; None for a path."""
    if not path:
        return "The image's name is empty ('' is not a path); give the path of a file."
    if not is_url(path):
        return None
    scheme = path.partition(":")[0]
    url = _URL.sub(r"\1://", path, count=1) if not path.startswith(f"{scheme}://") else path
    if scheme.lower() == "file":
        return f"{short_name(url)} is a URL; give the path of the file without file://."
    return f"{short_name(url)} is a URL, which is not fetched here; download it first and give the path of the file."


def lfs_problem(name: object) -> str:
    """Return the sentence about a file that begins with `LFS_POINTER`."""
    return f"{name} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder."


def check_regular(path: str) -> Path:
    """Return the path, but refuse a pipe, socket or device, which could block without end when opened."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return Path(path)  # opening it raises the error to report
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ImageError(f"{path} is not a regular file. Give the bytes of a pipe, or - on the command line for stdin.")
    return Path(path)


def read_data_url(url: str) -> io.BytesIO:
    """Return the content of a data URL with base64. Raises ImageError, without the URL, which may be very long."""
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError("The data URL must begin as data:image/png;base64, and hold base64 after the comma.")
    if len(content) > MAX_STREAM_BYTES * 4 // 3:
        raise ImageError(f"The data URL has more than {MAX_STREAM_BYTES >> 20} MiB, too much for an image.")
    encoded = unquote_to_bytes(content).translate(None, b" \t\r\n").rstrip(b"=")
    try:
        return io.BytesIO(base64.b64decode(encoded + b"=" * (-len(encoded) % 4), altchars=None, validate=True))
    except (binascii.Error, ValueError):
        raise ImageError(
            "The data URL does not hold base64 after its comma; encode the file as base64 again."
        ) from None


def read_stream(stream: "BinaryReader") -> io.BytesIO:
    """Read a file object from its position to its end. Raises ImageError, also beyond the limit."""
    buffer = io.BytesIO()
    try:
        while chunk := stream.read(_CHUNK_BYTES):
            buffer.write(chunk)
            if buffer.tell() > MAX_STREAM_BYTES:
                raise ImageError(f"The file object has more than {MAX_STREAM_BYTES >> 20} MiB, too much for an image.")
    except ImageError:
        raise
    except TypeError:
        raise ImageError("The file object does not return bytes; open the file in binary mode.") from None
    except Exception as error:  # noqa: BLE001  closed files, lost connections: any class of the caller's
        raise ImageError(f"The file object cannot be read: {error or type(error).__name__}.") from None
    if buffer.tell() == 0:
        raise ImageError("The file object is empty or at its end; seek(0) goes back to its start.")
    buffer.seek(0)
    return buffer
