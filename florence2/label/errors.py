"""The limit of errors at which a run ends early."""

import argparse
from dataclasses import dataclass

_LEAST = 100  # rows before a share of them means something


@dataclass(frozen=True)
class ErrorLimit:
    """How many rows may be errors: `count` of them, or a `share` of all once there are 100."""

    count: int | None = None
    share: float | None = None

    def is_exceeded(self, failed: int, rows: int) -> bool:
        """Return whether more of the rows of a run have failed than may."""
        if self.count is not None:
            return failed > self.count
        return self.share is not None and rows >= _LEAST and failed > self.share * rows


def parse_error_limit(text: str) -> ErrorLimit:
    """Return the limit that "20" or "5%" stands for. Raises ArgumentTypeError for anything else."""
    number = text.removesuffix("%")
    try:
        value = float(number) if text.endswith("%") else int(number)
    except ValueError:
        value = -1
    if not 0 <= value <= (100 if text.endswith("%") else float("inf")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of errors, such as 20, nor a share, such as 5%")
    return ErrorLimit(share=value / 100) if text.endswith("%") else ErrorLimit(count=int(value))
