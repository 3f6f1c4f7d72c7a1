"""One question of a benchmark, and the error of a file that does not hold any."""

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from florence2.errors import Florence2Error

Truth = TypeVar("Truth")


class TableError(Florence2Error):
    """A file of a benchmark is missing, or does not have the form in which its owners distribute it."""


@dataclass(frozen=True)
class BenchmarkExample(Generic[Truth]):
    """One question about one image.

    Attributes:
        id: Identifies the example within its split.
        image: The file of the image; it may be missing.
        text: The input of the question: an expression, a sentence, a question; None where the task takes none.
        truth: The answer wanted, in the form of its family.
    """

    id: str
    image: Path
    text: str | None
    truth: Truth
