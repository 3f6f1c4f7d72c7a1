"""Training data: images with questions and answers."""

from dataclasses import dataclass
from typing import Protocol

from florence2.inputs.image import ImageInput


@dataclass(frozen=True)
class Sample:
    """An image with (prefix, suffix) pairs: a prompt as a user writes it, and the text to be generated."""

    image: ImageInput
    pairs: tuple[tuple[str, str], ...]
    name: str = ""


class Samples(Protocol):
    """Training data: a list of samples, or an object that makes each sample on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...
