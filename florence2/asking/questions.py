"""Questions by their names: `caption`, `detect`, `ground` and their like, for whatever answers tasks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from florence2.answers.answer import Answer, Box
from florence2.answers.cascade import Cascade
from florence2.asking.processor import AnswerProcessor
from florence2.asking.requests import (
    AnyImage,
    Arrived,
    EncodedImage,
    PreparedImage,
    Request,
    check_background,
    choose_input,
    outline_requests,
)
from florence2.errors import Florence2Error, PromptError, shown
from florence2.generation.options import GenerationOptions
from florence2.inputs.image import Colour, ImageInput
from florence2.inputs.processor import TaskText

Item = TypeVar("Item")
Detail = Literal["short", "detailed", "more_detailed"]
_CAPTIONS = {"short": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "more_detailed": "<MORE_DETAILED_CAPTION>"}


class Questions(ABC):
    """What answers tasks, and each common question as a method of its own. It knows no model."""

    processor: AnswerProcessor

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
        request = task, image, choose_input(task, text, box)
        return self.run_batch([request], background=background, options=options, **settings)[0]

    @abstractmethod
    def run_batch(
        self,
        requests: Sequence[Request],
        *,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[Answer]:
        """Answer many requests, whose tasks may differ."""

    @abstractmethod
    def encode_image(self, image: ImageInput, background: Colour | None = None) -> EncodedImage:
        """Run the vision tower on an image, once for all tasks to come."""

    def caption(
        self, image: AnyImage, detail: Detail = "short", *, options: GenerationOptions | None = None, **settings: Any
    ) -> Answer:
        """Describe the image in a sentence ("short"), a few ("detailed") or a paragraph ("more_detailed").

        `background` is as in `run`; `options` and `settings` are generation settings. Raises as `run`.
        """
        if not isinstance(detail, str) or detail not in _CAPTIONS:
            raise PromptError(f"detail is {shown(detail)}; it must be one of {', '.join(_CAPTIONS)}.")
        return self.run(_CAPTIONS[detail], image, options=options, **settings)

    def detect(
        self,
        image: AnyImage,
        classes: str | Sequence[str] | None = None,
        *,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Answer:
        """Find the boxes of everything the model knows, or of the `classes` (open vocabulary).

        `options` and `settings` are generation settings, as in `run`. Raises as `run`, and PromptError for an
        empty `classes`.
        """
        if classes is None:
            return self.run("<OD>", image, options=options, **settings)
        if isinstance(classes, str | list | tuple) and not (classes.strip() if isinstance(classes, str) else classes):
            raise PromptError(
                f"classes is {classes!r}; name at least one class, or leave out classes to find everything."
            )
        return self.run("<OPEN_VOCABULARY_DETECTION>", image, classes, options=options, **settings)

    def ground(
        self, image: AnyImage, caption: str, *, options: GenerationOptions | None = None, **settings: Any
    ) -> Answer:
        """Find the boxes of the phrases of `caption`.

        `options` and `settings` are generation settings, as in `run`. Raises as `run`.
        """
        return self.run("<CAPTION_TO_PHRASE_GROUNDING>", image, caption, options=options, **settings)

    def segment(
        self,
        image: AnyImage,
        text: str | None = None,
        *,
        box: Sequence[float] | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Answer:
        """Outline the object that `text` refers to, or the object inside `box` (x1, y1, x2, y2) in pixels.

        `options` and `settings` are generation settings, as in `run`. Raises as `run`, and PromptError unless
        exactly one of `text` and `box` is given.
        """
        if (text is None) == (box is None):
            got = "neither text nor box" if text is None else f"both text={shown(text)} and box={shown(box)}"
            raise PromptError(f"segment got {got}; give a text that refers to the object, or a box around it.")
        if box is None:
            return self.run("<REFERRING_EXPRESSION_SEGMENTATION>", image, text, options=options, **settings)
        return self.run("<REGION_TO_SEGMENTATION>", image, box=box, options=options, **settings)

    def ocr(
        self,
        image: AnyImage,
        *,
        regions: bool = False,
        box: Sequence[float] | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Answer:
        """Read the text in the image: as plain text, as quads with their lines (`regions`), or only inside `box`.

        `box` is (x1, y1, x2, y2) in pixels. `options` and `settings` are generation settings, as in
        `run`. Raises as `run`, and PromptError for `regions` together with `box`.
        """
        if box is None:
            return self.run("<OCR_WITH_REGION>" if regions else "<OCR>", image, options=options, **settings)
        if regions:
            raise PromptError("ocr got regions=True and a box, but no task reads the regions inside a box; give one.")
        return self.run("<REGION_TO_OCR>", image, box=box, options=options, **settings)

    def describe(
        self, image: AnyImage, box: Sequence[float], *, options: GenerationOptions | None = None, **settings: Any
    ) -> Answer:
        """Describe in words the content of `box` (x1, y1, x2, y2) in pixels.

        `options` and `settings` are generation settings, as in `run`. Raises as `run`.
        """
        return self.run("<REGION_TO_DESCRIPTION>", image, box=box, options=options, **settings)

    def cascade(
        self,
        image: AnyImage,
        detail: Detail = "short",
        *,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Cascade:
        """Caption the image, find the caption's phrases in it, and outline each; the image is encoded once.

        A caption that cannot be grounded, because it is too long, and a box with swapped corners, which cannot be
        outlined, leave a gap; `Cascade.missing` says why.

        `background` is as in `run`; `options` and `settings` are generation settings. Raises as `run`.
        """
        check_background(background, [image])
        encoded = image if isinstance(image, EncodedImage) else self.encode_image(image, background)
        caption = self.caption(encoded, detail, options=options, **settings)
        nothing = self.processor.answer("<CAPTION_TO_PHRASE_GROUNDING>", "", image_size=encoded.size)
        phrases = caption.text.strip()
        if not phrases:
            return Cascade.join(caption, nothing, ())
        try:
            grounding = self.ground(encoded, phrases, options=options, **settings)
        except Florence2Error as error:
            return Cascade.join(
                caption, nothing, (), [f"The caption could not be grounded, so it stands alone: {error}"]
            )
        outlines, missing = self._outline(encoded, grounding.boxes, options, settings)
        return Cascade.join(caption, grounding, outlines, missing)

    def _outline(
        self, image: EncodedImage, boxes: Sequence[Box], options: GenerationOptions | None, settings: Mapping[str, Any]
    ) -> tuple[list[Answer], list[str]]:
        """Outline each box; return an answer for each, and a sentence for each gap."""
        requests, missing = outline_requests(image, boxes)
        outlines = [self.processor.answer("<REGION_TO_SEGMENTATION>", "", image_size=image.size) for _ in boxes]
        try:
            answers = self.run_batch(list(requests.values()), options=options, **settings)
        except Florence2Error as error:
            return outlines, [*missing, f"The boxes could not be outlined: {error}"]
        for i, answer in zip(requests, answers, strict=True):
            outlines[i] = answer
        return outlines, missing


class Runtime(Questions):
    """What answers any number of questions: all that the command line and runs over folders need."""

    @abstractmethod
    def options(self, **settings: Any) -> GenerationOptions:
        """Return the model's own generation settings, with some changed."""

    @abstractmethod
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
        """Answer requests of any number in their order, with errors in place of answers."""

    @abstractmethod
    def prepare_image(self, image: ImageInput, background: Colour | None = None) -> PreparedImage:
        """Read an image, in any thread."""

    @abstractmethod
    def encode_ahead(
        self, items: Iterable[Item], prepare: Callable[[Item], PreparedImage], at_once: int | None = None
    ) -> Iterator[tuple[Item, EncodedImage | Florence2Error]]:
        """Yield each item with its encoded image, or why it has none; `at_once` may be encoded together."""
