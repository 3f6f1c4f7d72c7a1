"""Florence2Lite: images and tasks in, answers out, without torch. `load` opens an exported folder."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from florence2.answers.answer import Answer, image_reference
from florence2.answers.confidence import Calibration, Likelihoods
from florence2.asking.processor import AnswerProcessor
from florence2.asking.questions import Questions
from florence2.asking.requests import (
    AnyImage,
    CheckedRequest,
    EncodedImage,
    PreparedImage,
    Request,
    check_background,
    check_batch_size,
    check_request,
    check_requests,
    encode_once,
)
from florence2.checkpoints.checks.belonging import check_image_settings, check_vocabulary
from florence2.checkpoints.checks.calibration import choose_calibration
from florence2.checkpoints.config_files import read_config
from florence2.errors import CheckpointError, Florence2Error, OptionError, PromptError, shown
from florence2.generation.options import GenerationOptions, SpecialIds
from florence2.inputs.image import Colour, ImageInput, normalise, parse_colour, resize_image
from florence2.inputs.processor import TaskText
from florence2.lite.arrays import Array
from florence2.lite.cache import Decoder, start_decoder
from florence2.lite.layout import SUFFIXES
from florence2.lite.likelihoods import read_again
from florence2.lite.search import Hypothesis, search
from florence2.lite.sessions import Graphs, open_graphs
from florence2.model.config import Florence2Config, check_grid, check_positions

Item = TypeVar("Item")


class Florence2Lite(Questions):
    """One exported model, ready to answer. Nothing in it changes, so threads may share it.

    Every method that answers takes generation settings, as those of `florence2.Florence2` do.

    Attributes:
        config: The shape of the model.
        processor: Its tokenizer, image settings, tasks and calibration.
    """

    def __init__(self, graphs: Graphs, config: Florence2Config, processor: AnswerProcessor, name: str | None = None):
        """Join the graphs of a model with its configuration and the processor of the same folder.

        Args:
            graphs: The graphs, from `florence2.lite.sessions.open_graphs`.
            config: The shape of the model.
            processor: The tokenizer and image settings.
            name: What `repr` calls the model.

        Raises:
            CheckpointError: The tokenizer's vocabulary and the model's differ, the model has no positions for images of
                the processor's size, or the folder's generation settings are invalid.
        """
        check_vocabulary(config, processor.tokenizer)
        check_image_settings(config, processor.image_config)
        self.config, self.processor, self.name, self._graphs = config, processor, name, graphs
        try:
            self._options = GenerationOptions.from_settings(config.generation)
        except OptionError as error:
            raise CheckpointError(f"The checkpoint's own generation settings cannot be used: {error}") from None

    def __repr__(self) -> str:
        return f"Florence2Lite({self.name or ''})"

    def options(self, **settings: Any) -> GenerationOptions:
        """Return the model's own generation settings, with some changed. Raises OptionError for wrong ones."""
        return self._options.changed(**settings)

    def run(
        self,
        task: str,
        image: AnyImage,
        text: TaskText = None,
        *,
        box: Sequence[float] | None = None,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Answer:
        """Answer one task on one image. Takes, returns and raises what `florence2.Florence2.run` does.

        Args:
            task: A token such as "<OD>", its alias "od", or a free prompt.
            image: A path, the bytes of an image file, a Pillow image, an array, or an `EncodedImage`.
            text: The task's input: text, a list of classes, or a box.
            box: The task's input as a box (x1, y1, x2, y2) in pixels of the image.
            background: The colour that transparent pixels show; None is that of `load`.
            options: Generation settings; None is the model's own.
            **settings: Single generation settings, such as `num_beams=1`.

        Raises:
            PromptError: The task is unknown, or its input is missing, superfluous or wrong.
            ImageError: The image cannot be read.
            OptionError: A generation setting is unknown or out of range, or `background` is not a colour.
        """
        if text is not None and box is not None:
            raise PromptError(f"Task {task} got two inputs, {shown(text)} and box={shown(box)}; give one.")
        options = self._choose_options(options, settings)
        request = check_request((task, image, text if box is None else box), self.processor.tasks)
        return self._answer(request, self._encoded(image, background), options)

    def run_batch(
        self,
        requests: Sequence[Request],
        *,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[Answer]:
        """Answer many requests, whose tasks may differ, as `florence2.Florence2.run_batch` does.

        All requests are checked before anything is computed, and each image is encoded once. They are answered one
        after the other, so `batch_size` is only checked.

        Args:
            requests: (task, image) or (task, image, input) each, as in `run`.
            background: The colour that transparent pixels show, as in `run`.
            options: Generation settings; None is the model's own.
            batch_size: At least 1.
            **settings: Single generation settings, such as `num_beams=1`.

        Returns:
            The answers in the order of the requests.

        Raises:
            As `run`; an ImageError is raised when the image is first needed.
        """
        options = self._choose_options(options, settings)
        check_batch_size(batch_size)
        checked = check_requests(requests, self.processor.tasks)
        sources = [request.image for request in checked]
        check_background(background, sources)
        images = encode_once(sources, lambda new: (self.encode_image(image, background) for image in new))
        return [self._answer(request, image, options) for request, image in zip(checked, images, strict=True)]

    def stream(
        self,
        requests: "Iterable[Request | Florence2Error]",
        *,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> Iterator[Answer | Florence2Error]:
        """Answer requests of any number in their order, with errors in place of answers; see `Florence2.stream`.

        Args:
            requests: (task, image) or (task, image, input) each, as in `run`; an error comes back in its place.
            background: The colour that transparent pixels show, as in `run`.
            options: Generation settings; None is the model's own.
            batch_size: At least 1; requests are answered one after the other.
            **settings: Single generation settings, such as `num_beams=1`.

        Yields:
            For each request its answer, or the error that kept it from one.

        Raises:
            OptionError: `batch_size` or a generation setting is wrong.
        """
        chosen = self._choose_options(options, settings)
        check_batch_size(batch_size)
        if not isinstance(requests, Iterable) or isinstance(requests, str | bytes | Mapping):
            raise PromptError(f"requests is {shown(requests)}; give an iterable of (task, image[, input]).")
        return (self._answer_or_error(request, background, chosen) for request in requests)

    def prepare_image(self, image: ImageInput, background: Colour | None = None) -> PreparedImage:
        """Read an image, in any thread, and resize it. Takes and raises what `encode_image` does."""
        opened = self.processor.open_image(image, background)
        # what an answer may show itself on later; bytes and consumed files are not worth keeping
        kept = isinstance(image, str | os.PathLike | Image.Image) or hasattr(image, "__array__")
        pixels = resize_image(opened, self.processor.image_config)
        return PreparedImage(pixels, opened.size, image if kept else None)

    def encode_image(self, image: ImageInput, background: Colour | None = None) -> EncodedImage:
        """Run the vision tower on an image, once for all tasks to come.

        Args:
            image: A path, the bytes of an image file, a Pillow image or an array (see `open_image`).
            background: The colour that transparent pixels show, such as "white"; None is that of `load`.

        Returns:
            The image's features, an array (1, N, D), and its size. Every method takes it in place of the image.

        Raises:
            ImageError: The image cannot be read.
            OptionError: `background` is not a colour.
        """
        return self._encode(self.prepare_image(image, background))

    def encode_ahead(
        self, items: Iterable[Item], prepare: Callable[[Item], PreparedImage], at_once: int | None = None
    ) -> Iterator[tuple[Item, EncodedImage | Florence2Error]]:
        """Yield each item with its encoded image, or why it has none; `at_once` has no effect."""
        for item in items:
            encoded: EncodedImage | Florence2Error
            try:
                encoded = self._encode(prepare(item))
            except Florence2Error as error:
                encoded = error
            yield item, encoded

    def _encoded(self, image: AnyImage, background: Colour | None) -> EncodedImage:
        check_background(background, [image])
        return image if isinstance(image, EncodedImage) else self.encode_image(image, background)

    def _encode(self, image: PreparedImage) -> EncodedImage:
        pixel_values = normalise([image.pixels], self.processor.image_config)  # (1, 3, H, W)
        vision = self.config.vision
        check_grid(*vision.grid_size(*pixel_values.shape[-2:]), vision.max_position_embeddings)
        features = self._graphs.vision(pixel_values=pixel_values)[0]  # (1, N, D)
        return EncodedImage(features, image.size, image.source)

    def _choose_options(self, options: GenerationOptions | None, settings: Mapping[str, Any]) -> GenerationOptions:
        """Return the settings of one call."""
        if options is None:
            options = self._options
        if not isinstance(options, GenerationOptions):
            raise OptionError(
                f"options is {shown(options)}, not a GenerationOptions; write f.options(num_beams=1), or give the "
                "settings as keywords, num_beams=1."
            )
        return options.changed(**settings) if settings else options

    def _answer_or_error(
        self, request: "Request | Florence2Error", background: Colour | None, options: GenerationOptions
    ) -> Answer | Florence2Error:
        if isinstance(request, Florence2Error):
            return request
        try:
            checked = check_request(request, self.processor.tasks)
            return self._answer(checked, self._encoded(checked.image, background), options)
        except Florence2Error as error:
            return error

    def _answer(self, request: CheckedRequest, image: EncodedImage, options: GenerationOptions) -> Answer:
        text = self.config.text
        prompt = self.processor.encode(request.sentence(image.size))
        options = options.fitted(text.vocab_size, text.max_position_embeddings)
        decoder = start_decoder(self._graphs, text, self._remember(image, prompt))
        ids = SpecialIds(start=text.decoder_start_token_id, end=text.eos_token_id, pad=text.pad_token_id)
        found = search(decoder.step, decoder.reorder, options, ids)
        best, *others = (self._read(each, decoder, request, image, options) for each in found)
        return replace(best, alternatives=tuple(others))

    def _remember(self, image: EncodedImage, prompt: Sequence[int]) -> Array:
        """Encode an image and a prompt together -> memory (1, N + S, D)."""
        features = np.asarray(image.features, dtype=np.float32)
        if features.shape[-1] != self.config.text.d_model:
            raise PromptError(
                f"Encoded images of the shapes {[features.shape[1:]]} come from different models; encode them again."
            )
        count = features.shape[1] + len(prompt)
        check_positions(count, self.config.text.max_position_embeddings)
        words = self._graphs.embed(input_ids=np.array([prompt], dtype=np.int64))[0]
        embeddings = np.concatenate([features, words], axis=1)  # (1, N + S, D)
        mask = np.ones((1, count), dtype=np.int64)
        memory = self._graphs.encoder(inputs_embeds=embeddings, attention_mask=mask)[0]
        if not np.isfinite(memory).all():
            raise Florence2Error(
                "The encoded image and prompt hold values that are not finite: the weights, or what they compute, do "
                "not fit the type of the graphs; export the model in float32."
            )
        return memory

    def _read(
        self,
        found: Hypothesis,
        decoder: Decoder,
        request: CheckedRequest,
        image: EncodedImage,
        options: GenerationOptions,
    ) -> Answer:
        """Read one hypothesis as the answer to a request."""
        likelihoods: Likelihoods | None = None
        if options.confidence:
            likelihoods = read_again(decoder, found.ids, self.processor.location_ids)
        answer = self.processor.answer(
            request.task,
            image_size=image.size,
            token_ids=found.ids,
            token_logprobs=found.logprobs,
            sequence_score=found.score,
            finish_reason=found.finish_reason,
            likelihoods=likelihoods,
        )
        return replace(answer, image=image_reference(image.source))


def load(
    folder: str | os.PathLike[str],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    kind: str = "float32",
    background: Colour | None = None,
    calibration: str | os.PathLike[str] | Calibration | None = None,
) -> Florence2Lite:
    """Open an exported folder as a Florence2Lite that answers.

    Args:
        folder: What `florence2 export` has written, or a published folder of the same layout.
        provider: Where onnxruntime computes: "cpu", or another of its providers, such as "cuda".
        threads: How many threads an operation may use; None is onnxruntime's own choice.
        kind: The graphs to use where the folder has several: "float32" is those without an ending; "float16", "int8",
            "uint8", "q8" and "q4" are those of published folders.
        background: The colour that transparent pixels of images show, such as "white"; None drops alpha, as the
            reference does.
        calibration: A file of `florence2 calibrate`, or a `Calibration`, in place of the folder's `confidence.json`.

    Returns:
        The model.

    Raises:
        OptionError: An argument has a wrong value, or onnxruntime is not installed.
        CheckpointError, ConfigError: Files are missing, damaged, or do not fit each other.
    """
    if kind not in SUFFIXES:
        raise OptionError(f"kind is {shown(kind)}; it must be one of {', '.join(SUFFIXES)}.")
    if background is not None:
        background = parse_colour(background)
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"{shown(os.fspath(folder))} is not a folder; give one that `florence2 export` has written."
        )
    if not isinstance(calibration, Calibration):
        calibration = choose_calibration(path, file=None if calibration is None else Path(calibration))
    config = read_config(path)
    processor = AnswerProcessor.from_folder(path, calibration=calibration).changed(background=background)
    graphs = open_graphs(path, kind, provider, threads)
    return Florence2Lite(graphs, config, processor, os.fspath(folder))
