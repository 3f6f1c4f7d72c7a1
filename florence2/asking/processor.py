"""A checkpoint's way from images and prompts to arrays and ids, and from generated ids to an Answer."""

import operator
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from florence2.answers.answer import Answer, parse_answer
from florence2.answers.confidence import NO_CALIBRATION, Calibration, Likelihoods
from florence2.checkpoints.checks.calibration import choose_calibration
from florence2.checkpoints.config_files import read_image_config
from florence2.checkpoints.files import read_tasks
from florence2.errors import PromptError, shown
from florence2.inputs.coordinates import NUM_BINS, check_image_size
from florence2.inputs.image import Colour, ImageConfig
from florence2.inputs.processor import InputProcessor
from florence2.inputs.tasks import Task, TaskTable, find_task
from florence2.inputs.tokenizer import FlorenceTokenizer

Own = TypeVar("Own", bound="AnswerProcessor")
Number = TypeVar("Number", int, float)


class AnswerProcessor(InputProcessor):
    """Tokenizer, image settings and tasks of one checkpoint. Immutable; threads share it.

    Attributes:
        calibration: Turns raw confidences of the checkpoint's answers into frequencies.
    """

    def __init__(
        self,
        tokenizer: FlorenceTokenizer,
        image_config: ImageConfig,
        tasks: TaskTable | None = None,
        background: Colour | None = None,
        calibration: Calibration = NO_CALIBRATION,
    ):
        """Join the parts. Raises OptionError when `background` is not a colour."""
        super().__init__(tokenizer, image_config, tasks, background)
        self.calibration = calibration

    def changed(
        self: Own,
        tokenizer: FlorenceTokenizer | None = None,
        image_config: ImageConfig | None = None,
        tasks: TaskTable | None = None,
        background: Colour | None = None,
        calibration: Calibration | None = None,
    ) -> Own:
        """Return a processor with some parts replaced; None keeps a part."""
        changed = super().changed(tokenizer, image_config, tasks, background)
        changed.calibration = self.calibration if calibration is None else calibration
        return changed

    @cached_property
    def location_ids(self) -> tuple[int, ...]:
        """The ids of the location tokens in the order of their bins."""
        ids = [self.tokenizer.token_id(f"<loc_{bin}>") for bin in range(NUM_BINS)]
        return tuple(id for id in ids if id is not None)

    @classmethod
    def from_folder(
        cls: type[Own], folder: Path, adapter: Path | None = None, calibration: Calibration | None = None
    ) -> Own:
        """Read a processor from a checkpoint.

        Args:
            folder: Holds `tokenizer.json`, `preprocessor_config.json` or `processor_config.json`, `tasks.json` if the
                checkpoint has tasks of its own, and `confidence.json` if it was calibrated.
            adapter: The folder of an adapter, which may hold the last two as well.
            calibration: The calibration to use; None reads `confidence.json`.

        Raises:
            CheckpointError: The tokenizer is missing or damaged.
            ConfigError: The image settings are missing, or they, the tasks or the calibration describe something this
                project does not implement, or the adapter's tasks contradict the checkpoint's.
        """
        tokenizer = FlorenceTokenizer(folder / "tokenizer.json")
        tasks = TaskTable(read_tasks(folder, adapter))
        if calibration is None:
            calibration = choose_calibration(folder, adapter)
        return cls(tokenizer, read_image_config(folder), tasks, calibration=calibration)

    def answer(
        self,
        task: str | Task,
        text: str | None = None,
        *,
        image_size: tuple[int, int],
        token_ids: Iterable[Any] | None = None,
        token_logprobs: Iterable[Any] | None = None,
        sequence_score: float | None = None,
        finish_reason: str | None = None,
        likelihoods: Likelihoods | None = None,
    ) -> Answer:
        """Read generated text or ids as the answer to a task.

        Args:
            task: The task or the prompt that was answered.
            text: The generated text; give either this or `token_ids`.
            image_size: (width, height) of the image in pixels.
            token_ids: The generated ids, a sequence, an array or a tensor, with the decoder's start id first.
            token_logprobs: The log-probability of each id after the first. With it, boxes, quads, polygons and the
                text get scores.
            sequence_score: The hypothesis' score in the beam search.
            finish_reason: "stop" or "length".
            likelihoods: The model's own probabilities along the T ids after the first. With them, boxes, quads,
                polygons and texts get confidences.

        Raises:
            PromptError: Neither or both of `text` and `token_ids` are given, `token_logprobs` or `likelihoods` has
                another length, or an argument has another type.
        """
        image_size = check_image_size(image_size)
        if not isinstance(task, str | Task):
            raise PromptError(f"task is {shown(task)}; it must be a task or a text.")
        if not isinstance(text, str | None):
            raise PromptError(f"text is {shown(text)}; it must be a text.")
        if (text is None) == (token_ids is None):
            raise PromptError("An answer is read either from a text or from token_ids; give exactly one of them.")
        known = task if isinstance(task, Task) else find_task(task, self.tasks)
        ids = [] if token_ids is None else _numbers("token_ids", token_ids, operator.index)
        logprobs = [] if token_logprobs is None else _numbers("token_logprobs", token_logprobs, float)
        if logprobs and len(logprobs) != len(ids) - 1:
            raise PromptError(
                f"{len(ids)} token_ids, the first being the start id, need {max(len(ids) - 1, 0)} token_logprobs, "
                f"not {len(logprobs)}."
            )
        if likelihoods is not None:
            _check_likelihoods(likelihoods, len(ids) - 1)
        return parse_answer(
            str(task) if known is None else known.token,
            "text" if known is None else known.answer,
            self.decode(ids) if text is None else text,
            image_size,
            token_ids=ids,
            token_logprobs=logprobs,
            token_texts=self.tokenizer.token_texts(ids) if logprobs or likelihoods is not None else (),
            sequence_score=sequence_score,
            finish_reason=finish_reason,
            likelihoods=likelihoods,
            calibration=self.calibration,
        )


def _check_likelihoods(likelihoods: Likelihoods, length: int) -> None:
    """Raise PromptError unless the likelihoods are those of `length` ids."""
    shapes = tuple(likelihoods.logprobs.shape), tuple(likelihoods.locations.shape)
    if shapes != ((length,), (length, NUM_BINS)):
        raise PromptError(
            f"The likelihoods have the shapes {shapes[0]} and {shapes[1]}; of {max(length, 0)} ids after the start id "
            f"they must be {(max(length, 0),)} and {(max(length, 0), NUM_BINS)}."
        )


def _numbers(name: str, values: Any, convert: Callable[[Any], Number]) -> list[Number]:
    """Return the numbers of a sequence or tensor. Raises PromptError for anything else."""
    try:
        return [convert(value) for value in values]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        kind = "ids (whole numbers)" if convert is operator.index else "numbers"
        raise PromptError(f"{name} is {shown(values)}; it must be one row of {kind}.") from None
