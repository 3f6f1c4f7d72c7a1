"""Florence2: images and tasks in, answers out. `florence2.loading.load` makes one from files."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

from florence2.answers.answer import Answer
from florence2.asking.batches import Asked, in_parts
from florence2.asking.questions import Detail as Detail
from florence2.asking.questions import Runtime
from florence2.asking.requests import AnyImage as AnyImage
from florence2.asking.requests import Arrived as Arrived
from florence2.asking.requests import EncodedImage as EncodedImage
from florence2.asking.requests import PreparedImage as PreparedImage
from florence2.asking.requests import Request as Request
from florence2.asking.requests import (
    check_background,
    check_batch_size,
    check_requests,
    check_stream,
    choose_input,
    choose_options,
    encode_once,
)
from florence2.asking.requests import check_request as check_request
from florence2.checkpoints.checks.empty import Prepare
from florence2.errors import Florence2Error
from florence2.generation.options import GenerationOptions
from florence2.inputs.files import read_stream
from florence2.inputs.image import Colour, ImageInput, is_file_object
from florence2.inputs.processor import TaskText
from florence2.model.absent import find_absent
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import TraceBlock
from florence2.processor import Processor
from florence2.runner import Runner
from florence2.stream import answer_stream, encode_ahead, images_at_once
from florence2.tracing.budget import DEFAULT_LIMIT
from florence2.tracing.patches import PatchLike, patched
from florence2.tracing.recording import Tracing, trace
from florence2.tracing.selection import Unknown

Item = TypeVar("Item")
_SHARE = 0.2  # of the time, for the answers of a stream: the first one comes before all slots are filled
_OPENED = 8  # images that a batch opens before it encodes the first, so that a broken one costs nothing


class Florence2(Runner, Runtime):
    """One checkpoint, ready to answer. Nothing in it changes, so threads may share it.

    Every method that answers takes generation settings, either as keywords, `f.run("<OD>", image, num_beams=1)`, or
    as `options=f.options(num_beams=1)`; given both, the keywords change the options. `GenerationOptions` lists the
    settings.
    """

    processor: Processor

    def __init__(
        self, model: Florence2Model, processor: Processor, name: str | None = None, prepare: Prepare | None = None
    ):
        """Join a model and a processor.

        Args:
            model: The model, in eval mode.
            processor: The tokenizer and image settings of the same checkpoint.
            name: What `repr` calls the checkpoint.
            prepare: The function that has shaped the model before it was loaded, which `save` takes into account.

        Raises:
            CheckpointError: The tokenizer's vocabulary and the model's differ, the model has no positions for images of
                the processor's size, or the checkpoint's generation settings are invalid.
        """
        super().__init__(model, processor, prepare)
        self.name, self._absent = name, find_absent(model)

    def __repr__(self) -> str:
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        facts = [
            self.name,
            self._absent and f'parts="{self._absent.parts}"',
            f"{millions:.{0 if millions >= 10 else 1}f}M parameters",
            str(self.model.device),
            str(self.model.dtype).removeprefix("torch."),
        ]
        return f"Florence2({', '.join(fact for fact in facts if fact)})"

    def trace(
        self, *patterns: str, limit: int = DEFAULT_LIMIT, unknown: Unknown = "refuse"
    ) -> AbstractContextManager[Tracing]:
        """Keep the values that `patterns` name, in every run of this object in this thread within the block.

        `with f.trace("decoder.layers.*.cross_attention") as t: f.run(...)`; see `florence2.tracing.recording`.
        """
        return trace(self, *patterns, limit=limit, unknown=unknown)

    def patched(self, patches: Mapping[str, PatchLike], *, unknown: Unknown = "refuse") -> TraceBlock:
        """Change the values that `patches` name, in every run of this object in this thread within the block.

        `with f.patched({"decoder.layers.2.cross_attention.heads": zero_heads([3])}): f.run(...)`; see
        `florence2.tracing.patches`.
        """
        return patched(self, patches, unknown=unknown)

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
        """Answer one task on one image.

        Args:
            task: A token such as "<OD>", its alias "od", or a free prompt: several words that are
                not a task's name, or a `FreePrompt`.
            image: A path, the bytes of an image file, a Pillow image, an array (see `open_image`), or an
                `EncodedImage`.
            text: The task's input: text, a list of classes, or a box. It may also follow the token in `task`.
            box: The task's input as a box (x1, y1, x2, y2) in pixels of the image: a sequence, an array or a tensor.
            background: The colour that transparent pixels show, such as "white". None is that of `load`, which by
                default drops alpha, as the reference does.
            options: Generation settings; None is the checkpoint's own.
            **settings: Single generation settings, such as `num_beams=1`, `max_new_tokens=64` or `confidence=False`.

        Raises:
            PromptError: The task is unknown, or its input is missing, superfluous or wrong.
            ImageError: The image cannot be read.
            OptionError: A generation setting is unknown or out of range, or `background` is not a colour.
            Florence2Error: The model was loaded without its decoder.
        """
        given = choose_input(task, text, box)
        options = self._choose_options(options, settings)
        request = check_request((task, image, given), self.processor.tasks)
        return self._answer([request], self._encode_sources([image], background), options)[0]

    def run_batch(
        self,
        requests: Sequence[Request],
        *,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[Answer]:
        """Answer many requests, whose tasks may differ. Every answer has the tokens that `run` gives.

        All requests are checked before anything is computed, and each image is encoded once, when it is first needed.
        An answer that ends makes room for the next; none waits for a longer one.

        Args:
            requests: (task, image) or (task, image, input) each, as in `run`.
            background: The colour that transparent pixels show, as in `run`.
            options: Generation settings; None is the checkpoint's own.
            batch_size: How many requests are answered at once, at least 1; fewer where memory would not suffice. By
                default as many as fit into a quarter of the free memory, at most 64.
            **settings: Single generation settings, such as `num_beams=1`.

        Returns:
            The answers in the order of the requests.

        Raises:
            Florence2Error: As `run`; an ImageError when the image is first needed.
        """
        options, size = self._choose_options(options, settings), check_batch_size(batch_size)
        checked = check_requests(requests, self.processor.tasks)
        sources = [request.image for request in checked]
        check_background(background, sources)
        images = encode_once(sources, partial(self._encode_ahead, background=background, at_once=size))
        answers: list[Answer] = []
        for answer in answer_stream(self, zip(checked, images, strict=True), options, size):
            if isinstance(answer, Florence2Error):
                raise answer
            answers.append(answer)
        return answers

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
        """Answer requests of any number as `run_batch` does, in their order, with errors in place of answers.

        The next request is taken when there is room for it, so `requests` may be a generator that reads images as it
        goes. Images are not compared: to ask several questions about one, encode it once with `encode_image`.

        Args:
            requests: (task, image) or (task, image, input) each, as in `run`; an error stands for a request that
                could not be made, and comes back in its place.
            background: The colour that transparent pixels show, as in `run`.
            options: Generation settings; None is the checkpoint's own.
            batch_size: How many requests are answered at once, at least 1; fewer where memory would not suffice. By
                default as many as fit into a quarter of the free memory, at most 64.
            arrived: Called with a request's number from 0 and its answer or error, as soon as that is known. An
                answer may wait for a slower one before it, and Ctrl-C would lose it.
            **settings: Single generation settings, such as `num_beams=1`.

        Yields:
            For each request its answer, or the PromptError, ImageError or OptionError that kept it from one.

        Raises:
            OptionError: `batch_size` or a generation setting is wrong.
            Florence2Error: The model was loaded without its decoder.
        """
        options, size = self._choose_options(options, settings), check_batch_size(batch_size)
        check_stream(requests)
        asked = (self._open(each, background) for each in requests)
        return answer_stream(self, asked, options, size, _SHARE, arrived)

    def _open(self, request: "Request | Florence2Error", background: Colour | None) -> Asked | Florence2Error:
        """Check a request and encode its image; return the error where that fails."""
        if isinstance(request, Florence2Error):
            return request
        try:
            checked = check_request(request, self.processor.tasks)
            return checked, self._encode_sources([checked.image], background)[0]
        except Florence2Error as error:
            return error

    def _choose_options(self, options: GenerationOptions | None, settings: Mapping[str, Any]) -> GenerationOptions:
        """Return the settings of one call, which only a complete model can follow."""
        if self._absent is not None:
            raise self._absent.error()
        return choose_options(self._options, options, settings)

    def encode_ahead(
        self, items: Iterable[Item], prepare: Callable[[Item], PreparedImage], at_once: int | None = None
    ) -> Iterator[tuple[Item, EncodedImage | Florence2Error]]:
        """Yield each item with its encoded image, or why it has none; see `florence2.stream.encode_ahead`."""
        return encode_ahead(self, items, prepare, at_once)

    def _encode_sources(self, sources: Sequence[AnyImage], background: Colour | None = None) -> list[EncodedImage]:
        """Encode the images that are not encoded yet; return all in order."""
        check_background(background, sources)
        new = [self.prepare_image(image, background) for image in sources if not isinstance(image, EncodedImage)]
        encoded = iter(self.encode_images(new))
        return [image if isinstance(image, EncodedImage) else next(encoded) for image in sources]

    def _encode_ahead(
        self, sources: Iterable[ImageInput], background: Colour | None, at_once: int | None
    ) -> Iterator[EncodedImage]:
        """Encode images in their order; where several threads read, they read the next ones meanwhile."""
        prepare = partial(self.prepare_image, background=background)
        if self.choose_pixels().threads == 1:  # a thread would take time from the model, which uses all cores
            opened = max(images_at_once(self, at_once), min(at_once or _OPENED, _OPENED))
            for part in in_parts(sources, opened):
                yield from self.encode_images([prepare(source) for source in part])
            return
        # a file object may belong to this thread, so the reading threads get its bytes
        sources = (read_stream(source) if is_file_object(source) else source for source in sources)
        for _, image in encode_ahead(self, sources, prepare, at_once):
            if isinstance(image, Florence2Error):
                raise image
            yield image
