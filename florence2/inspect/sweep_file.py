"""The file of a sweep: its fingerprint, then a row for each part, so that a stopped sweep can resume."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from florence2.checkpoints.files import written_whole
from florence2.errors import OptionError
from florence2.inspect.teacher_forcing import ForcedAnswer
from florence2.pipeline import Florence2


class SweepFile:
    """A JSON Lines file: {"sweep": fingerprint}, then rows. Without a path nothing is written."""

    def __init__(self, path: Path | None, mark: str):
        """Read the rows of an earlier run, by (name, head). Raises OptionError for those of another sweep."""
        self.path, self.mark = path, mark
        self.rows: dict[tuple[str, int | None], dict[str, Any]] = {}
        self.file: TextIO | None = None
        if path is not None and path.exists():
            earlier, self.rows = self.read(path)
            if earlier != mark:
                raise OptionError(
                    f"{path} holds the rows of a sweep of another checkpoint, other requests or other settings; choose "
                    "another file."
                )

    @staticmethod
    def read(path: Path) -> tuple[str, dict[tuple[str, int | None], dict[str, Any]]]:
        """Return the fingerprint and the rows, without a last line that was cut short.

        Raises OptionError when the file is not that of a sweep.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            mark = json.loads(lines[0])["sweep"]
            rows = [row for row in map(_read_row, lines[1:]) if row is not None]
            return mark, {(row["name"], row["head"]): row | {"by_request": tuple(row["by_request"])} for row in rows}
        except (OSError, ValueError, IndexError, KeyError, TypeError):
            raise OptionError(f"{path} is not the file of a sweep; choose another `out`.") from None

    def __enter__(self) -> "SweepFile":
        """Open the file, rewritten without a line that was cut short."""
        if self.path is not None:
            lines = [{"sweep": self.mark}, *self.rows.values()]
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with written_whole(self.path) as draft:
                    draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
                self.file = self.path.open("a", encoding="utf-8")
            except OSError as error:
                raise OptionError(f"{self.path} cannot be written ({error}); choose another `out`.") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and flush it, so that it survives a crash."""
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


def _read_row(line: str) -> Any:
    """Return one row; None for a line that was cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def fingerprint(f: Florence2, cases: Sequence[ForcedAnswer], *settings: object) -> str:
    """Return a hash of everything that the rows of a sweep depend on: weights, requests, answers and settings.

    It covers all weights, since a single head may have changed; a gigabyte takes a second or two.
    """
    digest = hashlib.sha256()
    for name, tensor in f.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    for case in cases:
        digest.update(repr((case.prompt_ids, case.encoded.size, case.answer.token_ids)).encode())
        if case.prepared is not None:  # an encoded image is identified by its answer only
            digest.update(f.pixel_values([case.prepared]).cpu().numpy().tobytes())
    digest.update(repr(settings).encode())
    return digest.hexdigest()
