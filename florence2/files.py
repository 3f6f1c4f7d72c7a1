"""Files written whole or not at all."""

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file name in the same folder, renamed to `path` when the block ends well and removed otherwise.

    The file may be read by whom the process' umask lets read, whatever the block did to it.
    """
    draft = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}"
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the process' umask applies
    mode = draft.stat().st_mode
    try:
        yield draft
        if draft.stat().st_mode != mode:  # safetensors puts a file in its place that only the owner may read
            draft.chmod(stat.S_IMODE(mode))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all."""
    with written_whole(path) as draft:
        draft.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
