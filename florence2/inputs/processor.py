"""Turn images into arrays and prompts into ids, with one checkpoint's tokenizer and image settings."""

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from florence2.errors import PromptError, clip, shown
from florence2.inputs.coordinates import box_to_tokens, read_box
from florence2.inputs.image import Colour, ImageConfig, ImageInput, image_to_array, open_image, parse_colour
from florence2.inputs.tasks import TaskTable, build_sentence, split_prompt
from florence2.inputs.tokenizer import FlorenceTokenizer

TaskText: TypeAlias = "str | Sequence[str] | Sequence[float] | None"
"""The input of a task: text, a list of classes, or a box (x1, y1, x2, y2) in pixels."""

Own = TypeVar("Own", bound="InputProcessor")


class InputProcessor:
    """Tokenizer, image settings and tasks of one checkpoint. Immutable; threads may share it.

    Attributes:
        tokenizer: The checkpoint's tokenizer.
        image_config: Size, mean and standard deviation of the model's images.
        tasks: The tasks by token: the published ones, those of `register_task`, and the checkpoint's own.
        background: The colour that transparent pixels show; None drops alpha, as the reference does.
    """

    def __init__(
        self,
        tokenizer: FlorenceTokenizer,
        image_config: ImageConfig,
        tasks: TaskTable | None = None,
        background: Colour | None = None,
    ):
        """Join the parts. Raises OptionError when `background` is not a colour."""
        self.tokenizer, self.image_config, self.tasks = tokenizer, image_config, tasks or TaskTable()
        self.background = None if background is None else parse_colour(background)

    def changed(
        self: Own,
        tokenizer: FlorenceTokenizer | None = None,
        image_config: ImageConfig | None = None,
        tasks: TaskTable | None = None,
        background: Colour | None = None,
    ) -> Own:
        """Return a processor with some parts replaced; None keeps a part."""
        return type(self)(
            tokenizer or self.tokenizer,
            image_config or self.image_config,
            tasks or self.tasks,
            self.background if background is None else background,
        )

    def open_image(self, source: ImageInput, background: Colour | None = None) -> Image.Image:
        """Read an image as `florence2.inputs.image.open_image` does; without a `background`, on the processor's."""
        return open_image(source, self.background if background is None else background)

    def image_array(self, source: ImageInput, background: Colour | None = None) -> np.ndarray:
        """Read an image and compute the model's input.

        Args:
            source: An image in any form that `open_image` reads.
            background: The colour that transparent pixels show; None is the processor's own.

        Returns:
            float32 `pixel_values` of shape (1, 3, H, W), with the checkpoint's H and W.

        Raises:
            ImageError: The image cannot be read.
        """
        return image_to_array(self.open_image(source, background), self.image_config)

    def prompt(self, task: str, text: TaskText = None, image_size: tuple[int, int] | None = None) -> list[int]:
        """Convert a task and its input to prompt ids.

        Args:
            task: A task token, an alias, or a free prompt. The input may follow the token in the same string.
            text: The task's input: text, a list of classes, or a box (x1, y1, x2, y2) in pixels.
            image_size: (width, height) of the image in pixels; needed for a box.

        Returns:
            The ids, with `<s>` first and `</s>` last.

        Raises:
            PromptError: The task is unknown, or its input is missing, superfluous or malformed. As in the reference,
                prompts that only `check_prompt` refuses are accepted.
        """
        return self.encode(build_sentence(*split_prompt(task, input_to_text(text, image_size), self.tasks)))

    def encode(self, text: str) -> list[int]:
        """Convert text to ids, without looking for a task in it.

        Args:
            text: Any text. Added tokens in it, such as `<loc_5>`, become their own ids.

        Returns:
            The ids, with `<s>` first and `</s>` last.

        Raises:
            PromptError: The text is not a string, or contains surrogates, so it is not valid Unicode.
        """
        if not isinstance(text, str):
            raise PromptError(f"The text is {shown(text)}, not a string.")
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Convert ids to text.

        Args:
            ids: Token ids.
            skip_special: Leave out special tokens and location tokens.

        Returns:
            The text; bytes that are not valid UTF-8 become U+FFFD.
        """
        return self.tokenizer.decode(ids, skip_special)


def input_to_text(task_text: TaskText, image_size: tuple[int, int] | None = None) -> str | None:
    """Return a task's input as text: classes are joined by "<and>", a box becomes location tokens."""
    task_input = read_input(task_text)
    if not isinstance(task_input, tuple):
        return task_input
    if image_size is None:
        raise PromptError(f"The box {task_input} is in pixels; give image_size=(width, height) too.")
    return box_to_tokens(task_input, image_size)


def read_input(task_text: TaskText) -> str | tuple[float, float, float, float] | None:
    """Return a task's input as text, where classes are joined by "<and>", or as a box in pixels.

    Arrays and tensors are read as lists. Raises PromptError for anything else than `TaskText`.
    """
    if task_text is None or isinstance(task_text, str):
        return task_text
    items = _to_list(task_text)
    if items and all(isinstance(item, str) for item in items):
        if not all(item.strip() for item in items):
            raise PromptError(f"A class is empty in the list {shown(items)}; leave it out.")
        return "<and>".join(items)
    if len(items) == 4 and all(isinstance(item, Real) and not isinstance(item, bool) for item in items):
        return read_box(items)
    if items and all(isinstance(item, list | tuple) for item in items):
        raise PromptError(
            f"A question takes text, a list of classes, or one box (x1, y1, x2, y2), but got a list of {len(items)}: "
            f"{shown(items)}. Ask about each box with f.run_batch([(task, image, box) for box in boxes])."
        )
    raise PromptError(
        f"A task's input must be text, a list of classes, or one box (x1, y1, x2, y2) in pixels, not "
        f"{shown(task_text)}."
    )


def _to_list(values: Any) -> list[Any]:
    """Return the items of a sequence, array or tensor as Python's; an empty list for everything without an order."""
    if isinstance(values, bytes | bytearray | memoryview | Mapping | Set):
        return []
    if not isinstance(values, Iterable) and not hasattr(values, "tolist"):
        return []
    try:
        plain = values.tolist() if hasattr(values, "tolist") else [*values]
        return [_to_plain(item) for item in plain] if isinstance(plain, list) else []
    except Exception as error:  # noqa: BLE001  a tensor without values (on meta), a sparse one, a class of the user's
        raise PromptError(
            f"A {type(values).__name__} cannot be read as a task's input: {clip(error, 100).rstrip('.!')}. Give a box "
            "as four numbers, or as a dense tensor or array that holds values."
        ) from None


def _to_plain(item: Any) -> Any:
    return item.tolist() if hasattr(item, "tolist") else item
