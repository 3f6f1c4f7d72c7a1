"""`f.processor`: a checkpoint's way from images and prompts to tensors and ids, and from generated ids to an Answer."""

from collections.abc import Sequence
from pathlib import Path

import torch

from florence2.answers.answer import Answer, parse_answer
from florence2.checkpoints.config_files import read_image_config
from florence2.checkpoints.files import read_tasks
from florence2.errors import PromptError
from florence2.inputs.image import ImageInput
from florence2.inputs.processor import InputProcessor
from florence2.inputs.tasks import Task, TaskTable, find_task
from florence2.inputs.tokenizer import FlorenceTokenizer


class Processor(InputProcessor):
    """Tokenizer, image settings and tasks of one checkpoint, with tensors for a model. Immutable; threads share it."""

    @classmethod
    def from_folder(cls, folder: Path, adapter: Path | None = None) -> "Processor":
        """Read a processor from a checkpoint.

        Args:
            folder: Holds `tokenizer.json`, `preprocessor_config.json` or `processor_config.json`, and `tasks.json` if
                the checkpoint has tasks of its own.
            adapter: The folder of an adapter, which may hold a `tasks.json` too.

        Raises:
            CheckpointError: The tokenizer is missing or damaged.
            ConfigError: The image settings are missing, or they or the tasks describe something this project does not
                implement, or the adapter's tasks contradict the checkpoint's.
        """
        tokenizer = FlorenceTokenizer(folder / "tokenizer.json")
        return cls(tokenizer, read_image_config(folder), TaskTable(read_tasks(folder, adapter)))

    def image(self, source: ImageInput) -> torch.Tensor:
        """Return the pixel values of an image.

        Args:
            source: A path, the bytes of an image file, a Pillow image or an array (see `open_image`).

        Returns:
            float32 (1, 3, H, W), resized to the checkpoint's H and W, and normalised.

        Raises:
            ImageError: The image cannot be read.
        """
        return torch.from_numpy(self.image_array(source))

    def answer(
        self,
        task: str | Task,
        text: str | None = None,
        *,
        image_size: tuple[int, int],
        token_ids: Sequence[int] | torch.Tensor | None = None,
        token_logprobs: Sequence[float] | torch.Tensor | None = None,
        sequence_score: float | None = None,
        finish_reason: str | None = None,
    ) -> Answer:
        """Read generated text or ids as the answer to a task.

        Args:
            task: The task or the prompt that was answered.
            text: The generated text; give either this or `token_ids`.
            image_size: (width, height) of the image in pixels.
            token_ids: The generated ids, with the decoder's start id first.
            token_logprobs: The log-probability of each id after the first. With it, boxes, quads, polygons and the
                text get scores.
            sequence_score: The hypothesis' score in the beam search.
            finish_reason: "stop" or "length".

        Raises:
            PromptError: Neither or both of `text` and `token_ids` are given, or `token_logprobs` has another length.
        """
        if (text is None) == (token_ids is None):
            raise PromptError("An answer is read either from a text or from token_ids; give exactly one of them.")
        known = task if isinstance(task, Task) else find_task(task, self.tasks)
        ids = [] if token_ids is None else [int(id) for id in token_ids]
        logprobs = [] if token_logprobs is None else [float(logprob) for logprob in token_logprobs]
        if logprobs and len(logprobs) != len(ids) - 1:
            raise PromptError(
                f"{len(ids)} token_ids, the first being the start id, need {max(len(ids) - 1, 0)} token_logprobs, "
                f"not {len(logprobs)}."
            )
        return parse_answer(
            str(task) if known is None else known.token,
            "text" if known is None else known.answer,
            self.decode(ids) if text is None else text,
            image_size,
            token_ids=ids,
            token_logprobs=logprobs,
            token_texts=self.tokenizer.token_texts(ids) if logprobs else (),
            sequence_score=sequence_score,
            finish_reason=finish_reason,
        )
