"""The log of a run: `log.jsonl` for programs, and lines for people."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from florence2.checkpoints.files import MAX_NUMBER, cannot_write, written_whole
from florence2.errors import ConfigError
from florence2.train.schedule import rate_at
from florence2.train.settings import TrainSettings

LOG = "log.jsonl"
_TIMED = 10
"""Updates until the time of an epoch is known."""


class RunLog:
    """`log.jsonl` in `folder`, and a line to `say` every `log_every` steps. Only the `active` process writes."""

    def __init__(self, folder: Path, settings: TrainSettings, first: int, active: bool, say: Callable[[str], None]):
        """Open the log; drop what an interrupted run wrote after step `first`, the last one saved."""
        self.folder, self.settings, self.first, self.active = folder, settings, first, active
        self.say = say
        self.losses: list[tuple[float, int]] = []
        self.start = self.warm = time.monotonic()
        self.file = None
        if active:
            _drop_after(folder / LOG, first)
            self.file = (folder / LOG).open("a", encoding="utf-8")

    def restart_clock(self) -> None:
        """Count the seconds of the updates from now on, without the preparations before them."""
        self.start = time.monotonic()

    def step(self, step: int, loss: float, norm: float, labels: int) -> None:
        """Note the mean loss, gradient norm and number of labels of an update; `step` counts from 0."""
        self.losses.append((loss, labels))
        done, settings = step + 1, self.settings
        if done % settings.log_every and done != settings.steps:
            return
        count = sum(n for _, n in self.losses)
        mean = sum(loss * n for loss, n in self.losses) / count
        self.losses.clear()
        seconds, rate = time.monotonic() - self.start, rate_at(step, settings)
        self.write({"step": done, "loss": mean, "norm": norm, "learning_rate": rate, "seconds": round(seconds, 1)})
        if self.active:
            self._say_step(done, mean, rate, (done - self.first) / seconds)

    def _say_step(self, done: int, loss: float, rate: float, steps_per_second: float) -> None:
        left = timedelta(seconds=round((self.settings.steps - done) / steps_per_second))
        line = f"step {done} of {self.settings.steps}  loss {loss:.4f}  rate {rate:.2e}  "
        self.say(f"{line}{steps_per_second:.2f} steps/s  {left} left")

    def say_epoch(self, done: int, updates: int) -> None:
        """Ten updates after the start, say how long an epoch of `updates` takes. The first update is not counted."""
        made, now = done - self.first, time.monotonic()
        if made == 1:
            self.warm = now
        if self.active and made == _TIMED and updates > _TIMED:
            epoch = timedelta(seconds=round((now - self.warm) / (_TIMED - 1) * updates))
            self.say(f"An epoch of {updates:,} updates takes about {epoch}.")

    def has_evaluation(self, step: int) -> bool:
        """Return whether the log has a row of `step` other than that of its loss."""
        if not self.active:
            return False
        return any(row["step"] == step and "loss" not in row for row in read_log(self.folder / LOG))

    def write(self, row: dict[str, Any]) -> None:
        """Write one row."""
        if self.file is not None:
            try:
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
            except OSError as error:
                raise cannot_write(self.folder / LOG, error.strerror or str(error)) from None

    def close(self) -> None:
        """Close the file; a row that did not fit on the disk has been reported already."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, without a last one that was cut short.

    Raises ConfigError for a file that is damaged otherwise.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not _is_row(row):
            raise ConfigError(
                f"Line {number} of {path} is damaged: it must be a JSON object with a step and, if it has a loss, a "
                "learning rate. Remove the line, or the file, and give the same command again: the weights do not "
                "depend on it."
            )
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Return whether a value can be a row of the log."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] <= MAX_NUMBER:
        return False
    plotted = [row["loss"], row.get("learning_rate")] if "loss" in row else []
    return all(type(value) in (int, float) and abs(value) <= MAX_NUMBER for value in plotted)


def _drop_after(path: Path, step: int) -> None:
    """Remove the rows of later steps than the saved state: they will be written again."""
    if path.is_file():
        kept = [row for row in read_log(path) if row["step"] <= step]
        with written_whole(path) as draft:
            draft.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
