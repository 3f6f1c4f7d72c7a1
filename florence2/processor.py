"""What a checkpoint does to pictures and text on the way in, and to generated ids on the way out."""

from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import torch

from florence2.answers import Answer, parse_answer
from florence2.coordinates import box_to_tokens
from florence2.errors import PromptError
from florence2.image import ImageConfig, ImageInput, image_to_tensor, open_image, read_image_config
from florence2.tasks import build_sentence, find_task, split_prompt
from florence2.tokenizer import FlorenceTokenizer

TaskText: TypeAlias = "str | Sequence[str] | Sequence[float] | None"
"""The input of a task: text, a list of classes, or a box (x1, y1, x2, y2) in pixels."""


class Processor:
    """Tokenizer and picture settings of one checkpoint. Immutable; may be shared between threads."""

    def __init__(self, tokenizer: FlorenceTokenizer, image_config: ImageConfig):
        self.tokenizer, self.image_config = tokenizer, image_config

    @classmethod
    def from_folder(cls, folder: Path) -> "Processor":
        """Read `tokenizer.json` and `preprocessor_config.json`. Raises CheckpointError or ConfigError."""
        return cls(FlorenceTokenizer(folder / "tokenizer.json"), read_image_config(folder))

    def image(self, source: ImageInput) -> torch.Tensor:
        """A picture of any kind (see `open_image`) -> float32 `pixel_values` (1, 3, H, W)."""
        return image_to_tensor(open_image(source), self.image_config)

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

    def answer(
        self,
        task: str,
        text: str | None = None,
        *,
        image_size: tuple[int, int],
        token_ids: Sequence[int] | torch.Tensor | None = None,
        token_logprobs: Sequence[float] | torch.Tensor | None = None,
        sequence_score: float | None = None,
        finish_reason: str | None = None,
    ) -> Answer:
        """Read what was generated for `task` on a picture of `image_size` (width, height) pixels.

        Give either the `text`, or `token_ids` with the start id first. With `token_logprobs`, one for each id after
        the first, boxes, quads, polygons and text get scores. Raises PromptError when neither, both, or unequal
        lengths are given.
        """
        if (text is None) == (token_ids is None):
            raise PromptError("An answer is read either from a text or from token_ids; give exactly one of them.")
        found = find_task(task)
        kind = found.answer if found else "text"
        ids = [] if token_ids is None else [int(id) for id in token_ids]
        logprobs = [] if token_logprobs is None else [float(logprob) for logprob in token_logprobs]
        if logprobs and len(logprobs) != len(ids) - 1:
            raise PromptError(
                f"{len(ids)} token_ids, of which the first is the start id, need {max(len(ids) - 1, 0)} "
                f"token_logprobs, not {len(logprobs)}."
            )
        return parse_answer(
            found.token if found else task,
            kind,
            self.decode(ids) if text is None else text,
            image_size,
            token_ids=ids,
            token_logprobs=logprobs,
            token_texts=self.tokenizer.pieces(ids) if logprobs else (),
            sequence_score=sequence_score,
            finish_reason=finish_reason,
        )


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
