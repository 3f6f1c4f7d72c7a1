"""The log of a run: `log.jsonl` for programs, and lines on stderr for people."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from florence2.checkpoints.files import written_whole
from florence2.train.schedule import rate_at
from florence2.train.settings import TrainSettings

LOG = "log.jsonl"


class RunLog:
    """`log.jsonl` in `folder`, and a line on stderr every `log_every` steps. Only the `active` process writes."""

    def __init__(self, folder: Path, settings: TrainSettings, first: int, active: bool):
        """Open the log; drop what an interrupted run wrote after step `first`, the last one saved."""
        self.folder, self.settings, self.first, self.active = folder, settings, first, active
        self.losses: list[tuple[float, int]] = []
        self.start = time.monotonic()
        self.file = None
        if active:
            _drop_after(folder / LOG, first)
            self.file = (folder / LOG).open("a", encoding="utf-8")

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
            self._print(done, mean, rate, (done - self.first) / seconds)

    def _print(self, done: int, loss: float, rate: float, steps_per_second: float) -> None:
        left = timedelta(seconds=round((self.settings.steps - done) / steps_per_second))
        line = f"step {done} of {self.settings.steps}  loss {loss:.4f}  rate {rate:.2e}  "
        print(f"{line}{steps_per_second:.2f} steps/s  {left} left", file=sys.stderr, flush=True)

    def has_evaluation(self, step: int) -> bool:
        """Return whether the log has a row of `step` other than that of its loss."""
        if not self.active:
            return False
        rows = map(json.loads, (self.folder / LOG).read_text(encoding="utf-8").splitlines())
        return any(row["step"] == step and "loss" not in row for row in rows)

    def write(self, row: dict[str, Any]) -> None:
        """Write one row."""
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def _drop_after(path: Path, step: int) -> None:
    """Remove the rows of later steps than the saved state: they will be written again."""
    if path.is_file():
        rows = path.read_text(encoding="utf-8").split("\n")[:-1]  # a kill may leave half a row, without its line end
        kept = [row for row in rows if json.loads(row)["step"] <= step]
        with written_whole(path) as draft:
            draft.write_text("".join(f"{row}\n" for row in kept), encoding="utf-8")
