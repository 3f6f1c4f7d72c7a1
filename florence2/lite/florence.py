"""Florence2Lite: images and tasks in, answers out, without torch. `florence2.lite.loading.load` makes one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from florence2.answers.answer import Answer, image_reference
from florence2.answers.confidence import Likelihoods
from florence2.asking.batches import Asked, answer_in_batches, in_parts
from florence2.asking.processor import AnswerProcessor
from florence2.asking.questions import Runtime
from florence2.asking.requests import (
    AnyImage,
    Arrived,
    CheckedRequest,
    EncodedImage,
    PreparedImage,
    Request,
    check_background,
    check_batch_size,
    check_features,
    check_request,
    check_requests,
    check_stream,
    choose_options,
    encode_once,
    kept_source,
)
from florence2.checkpoints.checks.belonging import check_image_settings, check_vocabulary
from florence2.errors import CheckpointError, Florence2Error, OptionError
from florence2.generation.options import GenerationOptions, SpecialIds
from florence2.inputs.image import Colour, ImageInput, normalise, resize_image
from florence2.inputs.tasks import Task
from florence2.lite.cache import GraphDecoder, start_decoder
from florence2.lite.likelihoods import read_again
from florence2.lite.search.arrays import Array
from florence2.lite.search.search import Hypothesis, search
from florence2.lite.sessions import Graphs
from florence2.model.config import Florence2Config, check_grid, check_positions

Item = TypeVar("Item")
_TOGETHER = 4
"""How many questions are answered at once where nobody says it. A step of base with three beams takes 0.4 times as long
for each of them as alone; with eight it would be 0.3 times, and the first answers would come later."""


class Florence2Lite(Runtime):
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

    def with_tasks(self, tasks: Iterable[Task]) -> "Florence2Lite":
        """Return the same model with further tasks. Raises PromptError where one contradicts a task that it has."""
        processor = self.processor.changed(tasks=self.processor.tasks.declared(tasks))
        return Florence2Lite(self._graphs, self.config, processor, self.name)

    def options(self, **settings: Any) -> GenerationOptions:
        """Return the model's own generation settings, with some changed. Raises OptionError for wrong ones."""
        return self._options.changed(**settings)

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

        All requests are checked before anything is computed, and each image is encoded once.

        Args:
            requests: (task, image) or (task, image, input) each, as in `run`.
            background: The colour that transparent pixels show, as in `run`.
            options: Generation settings; None is the model's own.
            batch_size: How many requests are answered at once, at least 1; by default 4. Graphs of 8 bits answer one.
            **settings: Single generation settings, such as `num_beams=1`.

        Returns:
            The answers in the order of the requests.

        Raises:
            Florence2Error: As `run`; an ImageError when the image is first needed.
        """
        options = choose_options(self._options, options, settings)
        size = self._at_once(batch_size)
        checked = check_requests(requests, self.processor.tasks)
        sources = [request.image for request in checked]
        check_background(background, sources)
        images = encode_once(sources, lambda new: (self.encode_image(image, background) for image in new))
        parts = in_parts(zip(checked, images, strict=True), size)
        return [answer for part in parts for answer in self._answer(part, options)]

    def stream(
        self,
        requests: "Iterable[Request | Florence2Error]",
        *,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        arrived: Arrived | None = None,
        **settings: Any,
    ) -> Iterator[Answer | Florence2Error]:
        """Answer requests of any number in their order, with errors in place of answers; see `Florence2.stream`.

        Args:
            requests: (task, image) or (task, image, input) each, as in `run`; an error comes back in its place.
            background: The colour that transparent pixels show, as in `run`.
            options: Generation settings; None is the model's own.
            batch_size: How many requests are taken and answered at once, at least 1; by default 4. Graphs of 8 bits
                answer one.
            arrived: Called with a request's number from 0 and its answer or error, before these are yielded.
            **settings: Single generation settings, such as `num_beams=1`.

        Yields:
            For each request its answer, or the error that kept it from one.

        Raises:
            OptionError: `batch_size` or a generation setting is wrong.
        """
        chosen = choose_options(self._options, options, settings)
        size = self._at_once(batch_size)
        check_stream(requests)
        asked = (self._open(request, background) for request in requests)
        return answer_in_batches(lambda part: self._answer(part, chosen), asked, size, arrived or (lambda *_: None))

    def prepare_image(self, image: ImageInput, background: Colour | None = None) -> PreparedImage:
        """Read an image, in any thread, and resize it. Takes and raises what `encode_image` does."""
        opened = self.processor.open_image(image, background)
        return PreparedImage(resize_image(opened, self.processor.image_config), opened.size, kept_source(image))

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
        self,
        items: Iterable[Item],
        prepare: Callable[[Item], PreparedImage],
        at_once: int | None = None,  # noqa: ARG002  a batch would only cost memory
    ) -> Iterator[tuple[Item, EncodedImage | Florence2Error]]:
        """Yield each item with its encoded image, or why it has none."""
        for item in items:
            encoded: EncodedImage | Florence2Error
            try:
                encoded = self._encode(prepare(item))
            except Florence2Error as error:
                encoded = error
            yield item, encoded

    def _at_once(self, batch_size: int | None) -> int:
        """Return how many questions are answered together."""
        size = check_batch_size(batch_size) or _TOGETHER
        return 1 if self._graphs.one_scale else size  # an answer must not depend on its neighbours

    def _encoded(self, image: AnyImage, background: Colour | None) -> EncodedImage:
        check_background(background, [image])
        return image if isinstance(image, EncodedImage) else self.encode_image(image, background)

    def _encode(self, image: PreparedImage) -> EncodedImage:
        pixel_values = normalise([image.pixels], self.processor.image_config)  # (1, 3, H, W)
        vision = self.config.vision
        check_grid(*vision.grid_size(*pixel_values.shape[-2:]), vision.max_position_embeddings)
        features = self._graphs.vision(pixel_values=pixel_values)[0]  # (1, N, D)
        return EncodedImage(features, image.size, image.source)

    def _open(self, request: "Request | Florence2Error", background: Colour | None) -> Asked | Florence2Error:
        """Check a request and encode its image; return the error where that fails."""
        if isinstance(request, Florence2Error):
            return request
        try:
            checked = check_request(request, self.processor.tasks)
            return checked, self._encoded(checked.image, background)
        except Florence2Error as error:
            return error

    def _answer(self, asked: Sequence[Asked], options: GenerationOptions) -> list[Answer]:
        """Answer requests together."""
        text = self.config.text
        options = options.fitted(text.vocab_size, text.max_position_embeddings)
        prompts = [self.processor.encode(request.sentence(image.size)) for request, image in asked]
        memories = [self._remember(image, prompt) for (_, image), prompt in zip(asked, prompts, strict=True)]
        decoder = start_decoder(self._graphs, text, memories)
        ids = SpecialIds(start=text.decoder_start_token_id, end=text.eos_token_id, pad=text.pad_token_id)
        found = search(decoder.step, decoder.reorder, len(asked), options, ids)
        answers = []
        for question, ((request, image), hypotheses) in enumerate(zip(asked, found, strict=True)):
            read = partial(self._read, decoder, question, request, image, options)
            best, *others = map(read, hypotheses)
            answers.append(replace(best, alternatives=tuple(others)))
        return answers

    def _remember(self, image: EncodedImage, prompt: Sequence[int]) -> Array:
        """Encode an image and a prompt together -> memory (1, N + S, D)."""
        check_features([image], self.config.text.d_model)
        given = image.features
        # torch may have encoded it, on any device and in any type
        features = np.asarray(given.detach().float().cpu() if hasattr(given, "detach") else given, dtype=np.float32)
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
        decoder: GraphDecoder,
        question: int,
        request: CheckedRequest,
        image: EncodedImage,
        options: GenerationOptions,
        found: Hypothesis,
    ) -> Answer:
        """Read one hypothesis as the answer to a request."""
        likelihoods: Likelihoods | None = None
        if options.confidence:
            likelihoods = read_again(decoder, question, found.ids, self.processor.location_ids)
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
