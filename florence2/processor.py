"""`f.processor`: what a checkpoint does to images and prompts on the way in, and to generated ids on the way out."""

from collections.abc import Sequence
from pathlib import Path

import torch

from florence2.answers.answer import Answer, parse_answer
from florence2.checkpoints.config_files import read_image_config
from florence2.errors import PromptError
from florence2.inputs.image import ImageInput
from florence2.inputs.processor import InputProcessor
from florence2.inputs.tasks import find_task
from florence2.inputs.tokenizer import FlorenceTokenizer


class Processor(InputProcessor):
    """Tokenizer and image settings of one checkpoint, with tensors for a model. Immutable; threads may share it."""

    @classmethod
    def from_folder(cls, folder: Path) -> "Processor":
        """Read `tokenizer.json` and `preprocessor_config.json`. Raises CheckpointError or ConfigError."""
        return cls(FlorenceTokenizer(folder / "tokenizer.json"), read_image_config(folder))

    def image(self, source: ImageInput) -> torch.Tensor:
        """Return the float32 `pixel_values` (1, 3, H, W) of an image of any kind (see `open_image`)."""
        return torch.from_numpy(self.image_array(source))

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
            token_texts=self.tokenizer.token_texts(ids) if logprobs else (),
            sequence_score=sequence_score,
            finish_reason=finish_reason,
        )
