"""A model and its processor at work: images are prepared and encoded, checked requests are answered, in batches."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence2.answers.answer import Answer, image_reference
from florence2.answers.confidence import Likelihoods
from florence2.asking.requests import (
    CheckedRequest,
    EncodedImage,
    PreparedImage,
    check_features,
    kept_source,
)
from florence2.checkpoints.checkpoint import save_folder
from florence2.checkpoints.checks.belonging import check_image_size, check_vocabulary
from florence2.checkpoints.checks.empty import Prepare
from florence2.checkpoints.checks.loading import DTYPES
from florence2.errors import CheckpointError, OptionError, shown
from florence2.fast.cuda.pixels import DevicePixels
from florence2.generation.budget import answer_bytes, how_many_fit, images_that_fit, vision_bytes
from florence2.generation.engine.forced import read_again
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.generation.state import Generation
from florence2.inputs.image import Colour, ImageInput
from florence2.inputs.tasks import Task
from florence2.model.absent import require_complete
from florence2.model.config import Layout
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import Trace, start_trace
from florence2.processor import HostPixels, Processor

_VISION_SHARE = 0.25  # of the free memory, for the images that are encoded together; answers may run meanwhile


class Runner:
    """A model, its processor and its generation settings. Nothing in it changes, so threads may share it."""

    pixels: HostPixels | DevicePixels | None = None
    """Where images are resized; None is on the host, unless the model is on a CUDA device."""

    def __init__(self, model: Florence2Model, processor: Processor, prepare: Prepare | None = None):
        """Join a model in eval mode and the processor of the same checkpoint; `prepare` has shaped the model.

        Raises CheckpointError when their vocabularies differ, when the model has no positions for images of the
        processor's size, or when the checkpoint's generation settings are invalid.
        """
        self.model, self.processor, self._prepare = model, processor, prepare
        self._options = self._check_config()

    def _check_config(self) -> GenerationOptions:
        """Return the checkpoint's own generation settings. Raises CheckpointError as `__init__`."""
        check_vocabulary(self.model.config, self.processor.tokenizer)
        check_image_size(self.model.config, self.processor.image_config)
        try:
            return GenerationOptions.from_settings(self.model.config.generation)
        except OptionError as error:
            raise CheckpointError(f"The checkpoint's own generation settings cannot be used: {error}") from None

    def options(self, **settings: Any) -> GenerationOptions:
        """Return the checkpoint's own generation settings, with some changed. Raises OptionError for wrong ones."""
        return self._options.changed(**settings)

    def save(
        self,
        folder: str | os.PathLike[str],
        layout: Layout = "microsoft",
        dtype: str | torch.dtype | None = None,
        *,
        prepare: Prepare | None = None,
    ) -> None:
        """Write a checkpoint from which `load` brings back this model, its tokenizer and its settings.

        Before anything is written, the model is compared with what its configuration describes, so that nothing is
        lost without a word: changed settings belong into `load(changes=...)` or `model.config`, changed modules into
        a prepare function. A calibration is left out where it is of other weights, for it says nothing of these.

        Args:
            folder: Where to write; it is created, and must not hold a checkpoint.
            layout: "microsoft", or "native" for the names and files of transformers.
            dtype: The type of the stored weights: "float32", "float16", "bfloat16" or "float64"; None keeps the
                model's.
            prepare: The function that `load` will be given, for a model that was changed after it was loaded; None
                is the one that it was loaded with.

        Raises:
            CheckpointError: Something would not come back, or `folder` holds a checkpoint; everything that is wrong is
                listed.
            ConfigError: The layout has no place for a setting.
            OptionError: `layout` or `dtype` is unknown.
            Florence2Error: The model was loaded without some of its parts.
        """
        if layout not in ("microsoft", "native"):
            raise OptionError(f"layout is {shown(layout)}; it must be microsoft or native.")
        types = {**DTYPES, "float64": torch.float64, "None": None}
        name = str(dtype).removeprefix("torch.")
        if name not in types:
            raise OptionError(f"dtype is {shown(dtype)}; it must be one of {', '.join(types)}.")
        require_complete(self.model)
        self._check_config()
        save_folder(
            self.model,
            self.processor.tokenizer,
            self.processor.image_config,
            Path(folder),
            layout,
            types[name],
            prepare or self._prepare,
            self.processor.tasks,
            self.processor.calibration,
        )

    def prepare_image(self, image: ImageInput, background: Colour | None = None) -> PreparedImage:
        """Read an image for `encode_images`, in any thread. Takes and raises what `encode_image` does."""
        opened = self.processor.open_image(image, background)
        pixels = self.choose_pixels().read(opened, self.processor.image_config)
        return PreparedImage(pixels, opened.size, kept_source(image))

    def choose_pixels(self) -> HostPixels | DevicePixels:
        """Return what resizes images for this model."""
        return self.pixels or (DevicePixels() if self.model.device.type == "cuda" else HostPixels())

    def pixel_values(self, images: Sequence[PreparedImage]) -> Tensor:
        """Return the float32 pixel values (B, 3, H, W) of several images, on the model's device."""
        config, device = self.processor.image_config, self.model.device
        return self.choose_pixels().pixel_values([image.pixels for image in images], config, device)

    def encode_image(self, image: ImageInput, background: Colour | None = None) -> EncodedImage:
        """Run the vision tower on an image, once for all tasks to come.

        Args:
            image: A path, the bytes of an image file, a Pillow image or an array (see `open_image`).
            background: The colour that transparent pixels show, such as "white"; None is that of `load`.

        Returns:
            The image's features (1, N, D) and its size. Every method takes it in place of the image.

        Raises:
            ImageError: The image cannot be read.
            OptionError: `background` is not a colour.
        """
        return self.encode_images([self.prepare_image(image, background)])[0]

    def encode_images(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """Run the vision tower on several images, as many at once as memory allows; return them in the same order."""
        at_once = self.images_at_once(len(images)) if images else 1
        encoded = []
        for start in range(0, len(images), at_once):
            encoded += self._encode_together(images[start : start + at_once])
        return encoded

    def images_at_once(self, most: int) -> int:
        """Return how many images the tower may encode at once: at most `most`, and at least one."""
        device = self.model.device
        if device.type == "cpu":
            return 1  # a batch saves the time of launching kernels; on a CPU it would only cost memory
        image = self.processor.image_config
        each = vision_bytes(self.model.config.vision, image.height, image.width, self.model.dtype)
        return images_that_fit(each, device, most, _VISION_SHARE)

    def _encode_together(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """Encode one batch."""
        pixel_values, trace = self.pixel_values(images), start_trace(self)
        trace.image_started(pixel_values.shape)
        with torch.no_grad():
            features = self.model.encode_image(pixel_values, trace)
        encoded = [
            EncodedImage(row[None], image.size, image.source)  # (1, N, D)
            for row, image in zip(features, images, strict=True)
        ]
        trace.image_done(encoded)
        return encoded

    def _answer(
        self, requests: Sequence[CheckedRequest], images: Sequence[EncodedImage], options: GenerationOptions
    ) -> list[Answer]:
        """Answer requests on encoded images, as many at once as memory allows."""
        prompts = [
            self.processor.encode(request.sentence(image.size)) for request, image in zip(requests, images, strict=True)
        ]
        check_features(images, self.model.config.text.d_model)
        length = images[0].features.shape[1] + max(map(len, prompts))
        each = answer_bytes(self.model, options, length)
        at_once = how_many_fit(each, self.model.device)
        answers: list[Answer] = []
        for start in range(0, len(requests), at_once):
            part, trace = slice(start, start + at_once), start_trace(self)
            trace.answer_started(images[part], prompts[part], options)
            generations = self._generate(images[part], prompts[part], options, trace)
            read = [
                self._read(own, request.task, image)
                for own, request, image in zip(generations, requests[part], images[part], strict=True)
            ]
            trace.answer_done(read)
            answers += read
        return answers

    def _generate(
        self,
        images: Sequence[EncodedImage],
        prompts: Sequence[list[int]],
        options: GenerationOptions,
        trace: Trace,
    ) -> list[Generation]:
        """Generate the answers of one batch. Prompts of different lengths are padded, and the padding is masked."""
        longest = max(map(len, prompts))
        input_ids = torch.full((len(prompts), longest), self.model.config.text.pad_token_id)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = True
        # those of florence2.lite are arrays
        parts = [torch.as_tensor(image.features, device=self.model.device) for image in images]
        features = torch.cat(parts).to(self.model.dtype)  # (B, N, D)
        padding = None if mask.all() else mask.to(self.model.device)
        with torch.no_grad():
            memory = self.model.encode(features, input_ids.to(self.model.device), padding, trace)
        memory_mask = None if padding is None else self.model.memory_mask(features, padding)
        answers = generate(self.model, memory, options, memory_mask, trace).split(len(prompts))
        if not options.confidence or _patches_steps(start_trace(self, observe=False)):
            return answers
        lengths = [features.shape[1] + len(ids) for ids in prompts]  # without padding
        memories = [memory[row : row + 1, :length] for row, length in enumerate(lengths)]
        return read_again(self.model, list(zip(answers, memories, strict=True)), self.processor.location_ids)

    def _read(self, generation: Generation, task: Task, image: EncodedImage) -> Answer:
        """Read the best answer to one request, with the other hypotheses as alternatives."""
        answers = []
        for row in range(len(generation.sequences)):
            length = int(generation.lengths[row])
            likelihoods = _likelihoods(generation, row, length)
            answer = self.processor.answer(
                task,
                image_size=image.size,
                token_ids=generation.sequences[row, : 1 + length],
                token_logprobs=generation.token_logprobs[row, :length],
                sequence_score=float(generation.sequence_scores[row]),
                finish_reason=generation.finish_reasons[row],
                likelihoods=likelihoods,
            )
            answers.append(replace(answer, image=image_reference(image.source)))
        return replace(answers[0], alternatives=tuple(answers[1:]))


def _patches_steps(patches: Trace) -> bool:
    """Return whether patches in force change the decoder's steps, which a reading of the whole answer has not."""
    return patches.enters("decoder") or patches.wants("logits")


def _likelihoods(generation: Generation, row: int, length: int) -> Likelihoods | None:
    """Return the model's own probabilities along one row of `length` ids; None where they were not asked for."""
    logprobs, locations = generation.forced_logprobs, generation.location_probabilities
    if logprobs is None or locations is None:
        return None
    return Likelihoods(logprobs[row, :length].cpu().numpy(), locations[row, :length].cpu().numpy())
