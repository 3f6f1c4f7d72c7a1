"""A checkpoint's tokenizer and image settings at work: images become arrays, prompts become ids."""

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from florence2.errors import PromptError
from florence2.inputs.coordinates import box_to_tokens
from florence2.inputs.image import ImageConfig, ImageInput, image_to_array, open_image
from florence2.inputs.tasks import build_sentence, split_prompt
from florence2.inputs.tokenizer import FlorenceTokenizer

TaskText: TypeAlias = "str | Sequence[str] | Sequence[float] | None"
"""The input of a task: text, a list of classes, or a box (x1, y1, x2, y2) in pixels."""


class InputProcessor:
    """Tokenizer and image settings of one checkpoint. Immutable; threads may share it."""

    def __init__(self, tokenizer: FlorenceTokenizer, image_config: ImageConfig):
        self.tokenizer, self.image_config = tokenizer, image_config

    def image_array(self, source: ImageInput) -> np.ndarray:
        """Return the float32 `pixel_values` (1, 3, H, W) of an image of any kind (see `open_image`)."""
        return image_to_array(open_image(source), self.image_config)

    def prompt(self, task: str, text: TaskText = None, image_size: tuple[int, int] | None = None) -> list[int]:
        """A task token, alias or free prompt, and its input -> ids.

        The input may also follow the token in one string. A box in pixels needs `image_size`, (width, height).
        Raises PromptError as `split_prompt` and `box_to_tokens` do; what only `check_prompt` refuses goes through, as
        in the reference.
        """
        return self.encode(build_sentence(*split_prompt(task, input_to_text(text, image_size))))

    def encode(self, text: str) -> list[int]:
        """Text -> ids with `<s>` and `</s>` around it, unchanged by any task."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Ids -> text; `skip_special` leaves out every special and location token."""
        return self.tokenizer.decode(ids, skip_special)


def input_to_text(given: TaskText, image_size: tuple[int, int] | None = None) -> str | None:
    """A task's input as the text that follows its token: a box becomes location tokens, classes are joined."""
    if given is None or isinstance(given, str):
        return given
    items: list[Any] = list(given) if isinstance(given, Iterable) else []
    if items and all(isinstance(item, str) for item in items):
        if not all(item.strip() for item in items):
            raise PromptError(f"A class is empty in {items!r}; leave it out.")
        return "<and>".join(items)
    if len(items) == 4 and all(isinstance(item, Real) for item in items):
        if image_size is None:
            raise PromptError(f"The box {tuple(items)} is in pixels, so the size of its picture is needed too.")
        return box_to_tokens(items, image_size)
    raise PromptError(
        f"A task's input must be a text, a list of classes, or one box (x1, y1, x2, y2) in pixels, not {given!r}."
    )
